"""Attach to a model what its processes exchange. The model itself is written for one device (models/decoder.py)."""

from collections.abc import Sequence

from erniekit.models.decoder import CausalLM
from erniekit.models.picture_balance import PictureRanks
from erniekit.models.qat import connect_ranks
from erniekit.moe.all_to_all import ExpertRanks
from erniekit.moe.layer import MoELayer
from erniekit.nn.linear import Linear
from erniekit.nn.roles import Role, named_roles
from erniekit.nn.shard import RankShard, Shardable, ShardSpec, named_shard_specs
from erniekit.parallel.context import ContextRanks, Exchange
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import Group
from erniekit.parallel.tensor import TensorRanks


def rank_shard_of(mesh: Mesh, chunks: Sequence[Sequence[int]]) -> RankShard:
    """The part of the model that this process holds, given the layers of its chunks; WHOLE where nothing is divided."""
    degrees = mesh.degrees
    layers = tuple(layer for chunk in chunks for layer in chunk)
    return RankShard(
        tensor_rank=mesh.tensor,
        tensor_degree=degrees.tensor,
        expert_rank=mesh.expert,
        expert_degree=degrees.expert,
        layers=layers if degrees.pipeline > 1 else None,
        has_embedding=mesh.is_first_stage,
        has_head=mesh.is_last_stage,
    )


def parallelize(
    model: CausalLM,
    mesh: Mesh,
    sequence_parallel: bool,
    chunks: Sequence[Sequence[int]] | None = None,
    balance_pictures: bool = False,
    context_exchange: Exchange = "p2p",
) -> None:
    """Attach communication to projections, embedding, head and sparse layers. `chunks`: the layers of each chunk of
    this pipeline stage; None: one chunk with all layers that the process has. `balance_pictures`: data ranks divide the
    work of the vision transformer evenly. `context_exchange`: how the attention of context ranks exchanges what it
    needs.
    """
    degrees = mesh.degrees
    model.mesh = mesh
    if degrees.context > 1:
        model.context = ContextRanks(mesh.context_group, context_exchange)
    if chunks is not None:
        model.chunks = tuple(tuple(layers) for layers in chunks)
    sequence = sequence_parallel and degrees.tensor > 1
    ranks = TensorRanks(mesh.tensor_group, sequence) if degrees.tensor > 1 else None
    for layer in model.sublayers():
        if isinstance(layer, MoELayer) and degrees.tensor * degrees.expert > 1:
            layer.ranks = ExpertRanks(mesh.tensor_group, mesh.expert_group, sequence)
        elif isinstance(layer, Linear) and layer is not model.lm_head and ranks is not None:
            ranks.attach(layer)
            connect_ranks(layer, mesh)
    model.picture_ranks = _picture_ranks(model, mesh) if balance_pictures else None
    _share_ends(model, ranks, degrees.tensor)


def _share_ends(model: CausalLM, ranks: TensorRanks | None, tensor_degree: int) -> None:
    """Attach the tensor ranks to what is in front of the layers and behind them."""
    model.tensor = ranks
    if model.score is not None:
        model.score.num_ranks = tensor_degree
    if ranks is not None and model.model.embed_tokens is not None:
        model.model.embed_tokens.lookup = ranks.lookup
        model.model.embed_tokens.own_span = ranks.own_span


def _picture_ranks(model: CausalLM, mesh: Mesh) -> PictureRanks | None:
    """The data ranks that divide the vision transformer's work; None where there is none of it, or one such rank."""
    vision = model.config.vision
    if vision is None or not model.shard.has_embedding or mesh.degrees.data == 1:
        return None
    return PictureRanks(mesh.data_group, vision.spatial_merge_size)


def placements(model: CausalLM, mesh: Mesh, sharded: bool) -> dict[str, Placement]:
    """Where each parameter of this process's part has its copies, and whose gradients make up its own. `sharded`:
    optimizer state is divided over the ranks of the shard groups.
    """
    config, shard_specs, roles = model.config, named_shard_specs(model), named_roles(model)
    shares_ends = mesh.degrees.pipeline > 1 and (config.tie_word_embeddings or config.num_nextn_predict_layers > 0)
    partial = _partial_gradients(model)
    return {
        name: _placement(
            mesh, shard_specs.get(name), name in partial, shares_ends and roles[name] is Role.EMBEDDING, sharded
        )
        for name, _ in model.named_parameters()
    }


def _partial_gradients(model: CausalLM) -> set[str]:
    """Parameters that are whole on every tensor rank while their gradients are partial sums. With sequence parallelism
    a rank's own tokens give its part of all that is not divided, but for routers, which see all tokens.
    """
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_sublayers(include_self=True)
        if isinstance(layer, Shardable)
        for name in layer.partial_gradients()
    }
    if model.tensor is None or not model.tensor.sequence:
        return names
    return names | {name for name, role in named_roles(model).items() if role is not Role.ROUTER}


def _placement(mesh: Mesh, spec: ShardSpec | None, is_partial: bool, is_shared: bool, sharded: bool) -> Placement:
    alone, tensor_ranks = Group((mesh.rank,), 0), mesh.degrees.tensor
    if spec is not None and spec.over == "experts":
        gradient, shard, replica = mesh.expert_data_group, mesh.expert_shard_group, mesh.expert_shard_replica_group
    else:
        gradient, shard, replica = mesh.data_group, mesh.shard_group, mesh.shard_replica_group
    return Placement(
        gradient=gradient,
        shard=shard if sharded else alone,
        replica=replica if sharded else gradient,
        partial=alone if spec is not None else mesh.tensor_group,
        ends=mesh.ends_group if is_shared else alone,
        copies=gradient.size * (tensor_ranks if spec is None else 1) * (2 if is_shared else 1),
        share=1.0 if is_partial or spec is not None else 1.0 / tensor_ranks,
    )
