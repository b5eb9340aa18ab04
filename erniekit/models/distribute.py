"""Attach to a model what its processes exchange. The model itself is written for one device (models/decoder.py)."""

from collections.abc import Sequence

from erniekit.models.decoder import CausalLM
from erniekit.models.partition import Partition
from erniekit.moe.exchange import ExpertRanks
from erniekit.moe.layer import MoELayer
from erniekit.nn.linear import Linear
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.tensor import TensorRanks


def partition_of(mesh: Mesh, chunks: Sequence[Sequence[int]]) -> Partition:
    """The part of the model that this process holds, given the layers of its chunks."""
    degrees = mesh.degrees
    return Partition(
        tensor_rank=mesh.tensor,
        tensor_degree=degrees.tensor,
        expert_rank=mesh.expert,
        expert_degree=degrees.expert,
        layers=tuple(layer for chunk in chunks for layer in chunk),
        has_embedding=mesh.pipe == 0,
        has_head=mesh.pipe == degrees.pipeline - 1,
    )


def distribute(model: CausalLM, mesh: Mesh, sequence_parallel: bool) -> None:
    """Attach communication to projections, embedding, head and sparse layers."""
    degrees = mesh.degrees
    sequence = sequence_parallel and degrees.tensor > 1
    ranks = TensorRanks(mesh.tensor_group, sequence) if degrees.tensor > 1 else None
    for layer in model.sublayers():
        if isinstance(layer, MoELayer) and degrees.tensor * degrees.expert > 1:
            layer.ranks = ExpertRanks(mesh.tensor_group, mesh.expert_group, sequence)
        elif isinstance(layer, Linear) and layer is not model.lm_head and ranks is not None:
            ranks.attach(layer)
    model.tensor = ranks
    if ranks is not None and model.model.embed_tokens is not None:
        model.model.embed_tokens.lookup = ranks.lookup
