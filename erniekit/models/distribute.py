"""Attach to a model what its processes exchange. The model itself is written for one device (models/decoder.py)."""

from collections.abc import Sequence

from erniekit.models.decoder import CausalLM
from erniekit.models.local import named_cuts
from erniekit.models.partition import Partition
from erniekit.moe.exchange import ExpertRanks
from erniekit.moe.layer import MoELayer
from erniekit.nn.cut import Divisible
from erniekit.nn.linear import Linear
from erniekit.parallel.comm import Group
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.placement import Placement
from erniekit.parallel.tensor import TensorRanks

EMBEDDING = "model.embed_tokens.weight"


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


def placements(model: CausalLM, mesh: Mesh, sharded: bool) -> dict[str, Placement]:
    """Where each parameter of this process's part has its copies, and whose gradients make up its own. `sharded`:
    optimizer state is divided over the ranks of the shard groups.
    """
    degrees, alone = mesh.degrees, Group((mesh.rank,), 0)
    cuts = named_cuts(model)
    sequence = model.tensor is not None and model.tensor.sequence
    partial = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_sublayers(include_self=True)
        if isinstance(layer, Divisible)
        for name in layer.partial_gradients()
    }
    shares_ends = degrees.pipeline > 1 and (
        model.config.tie_word_embeddings or model.config.num_nextn_predict_layers > 0
    )
    found = {}
    for name, _ in model.named_parameters():
        cut = cuts.get(name)
        is_expert = cut is not None and cut.over == "experts"
        # With sequence parallelism a rank's own tokens give its part of what is not cut; routers see all tokens.
        is_partial = name in partial or (sequence and cut is None and ".gate." not in name)
        is_shared = shares_ends and name == EMBEDDING
        gradient = mesh.expert_data_group if is_expert else mesh.data_group
        shard, replica = alone, gradient
        if sharded:
            shard = mesh.expert_shard_group if is_expert else mesh.shard_group
            replica = mesh.expert_shard_replica_group if is_expert else mesh.shard_replica_group
        found[name] = Placement(
            gradient=gradient,
            shard=shard,
            replica=replica,
            partial=mesh.tensor_group if cut is None else alone,
            ends=mesh.ends_group if is_shared else alone,
            copies=gradient.size * (degrees.tensor if cut is None else 1) * (2 if is_shared else 1),
            share=1.0 if is_partial or cut is not None else 1.0 / degrees.tensor,
        )
    return found
