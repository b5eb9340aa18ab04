"""Which weights of a model ZeRO stage 3 divides: those of its blocks (parallel/sharded_units.py).

A block is a decoder layer or a block for multi-token prediction. Whole on every rank stay, as in stage 2: embedding,
output head, final norm, what stands around the blocks for multi-token prediction, vision transformer and resampler;
routers, which are small and whose matrix a loss reads; parameters that an adapter's run trains whole; and what has no
copy on another rank.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import paddle
from paddle import nn

from erniekit import lora
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import placements
from erniekit.models.pipeline_layout import parameter_chunks
from erniekit.nn.roles import Role, named_roles
from erniekit.parallel.buckets import Entry, item_bytes
from erniekit.parallel.memory import unit_bytes
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.sharded_units import DividedTensor, ShardedUnits
from erniekit.parallel.zero import entries_of


def blocks_of(model: CausalLM) -> Iterator[tuple[str, nn.Layer]]:
    """The blocks of this process's part, by name, in the order of a forward pass."""
    names = {id(layer): name for name, layer in model.named_sublayers()}
    layers = model.model.layers
    for block in (*(layers[number] for number in layers.numbers), *model.model.mtp_block):
        yield names[id(block)], block


def divided_entries(model: CausalLM, mesh: Mesh, saved: Iterable[str] = ()) -> list[Entry]:
    """The parameters of the blocks that are divided, in the order of a forward pass. Their shapes suffice. `saved`:
    those that an adapter will train whole, where it is not attached yet.
    """
    roles, where, state = named_roles(model), placements(model, mesh, sharded=True), lora.state_of(model)
    whole = {name for name, role in roles.items() if role is Role.ROUTER} | set(saved if state is None else state.saved)
    unit_of, tensors = {}, {}
    for block, layer in blocks_of(model):
        for own, parameter in layer.named_parameters():
            name = f"{block}.{own}"
            if name not in whole and where[name].shard.size > 1:
                unit_of[name], tensors[name] = block, parameter
    entries = entries_of(tensors, where, parameter_chunks(model, model.chunks), units=unit_of)
    return list(entries.values())


def local_tensors(model: CausalLM) -> dict[str, paddle.Tensor]:
    """What this process has of each parameter and buffer: of a divided one its chunk [c]."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return tensors if model.units is None else tensors | model.units.chunks


def weights_line(model: CausalLM) -> str:
    """One line for the log: what divided weights take on this rank."""
    assert model.units is not None
    divided, units = model.units.entries.values(), len(model.units.units)
    own = sum(tensor.size * tensor.element_size() for tensor in local_tensors(model).values())
    saved = sum((entry.size - entry.chunk) * item_bytes(entry.dtype) for entry in divided)
    return (
        f"weights: {own / 2**20:.1f} MiB on this rank between uses, {(own + saved) / 2**20:.1f} MiB if they were not "
        f"divided; those of one of {units} blocks are whole while it computes, at most "
        f"{unit_bytes(divided) / 2**20:.1f} MiB"
    )


@contextmanager
def whole_weights(model: CausalLM) -> Iterator[None]:
    """All weights are whole, for many passes that ranks do not run together (generation). Ranks enter it together."""
    units = model.units
    with nullcontext() if units is None else units.gathered(*units.units):
        yield


class WeightTaker:
    """Divides each weight as soon as it has been read or drawn, so that of divided weights one is whole at a time.
    `saved`: see divided_entries.
    """

    def __init__(self, model: CausalLM, mesh: Mesh, saved: Iterable[str] = ()) -> None:
        self._entries = {entry.name: entry for entry in divided_entries(model, mesh, saved)}
        self.values: dict[str, DividedTensor] = {}

    def __call__(self, name: str, parameter: paddle.Tensor) -> None:
        """The parameter has its values."""
        if name in self._entries:
            self.values[name] = DividedTensor.taken_from(parameter, self._entries[name])


def divide(model: CausalLM, mesh: Mesh, values: Mapping[str, DividedTensor] | None = None) -> None:
    """Divide the weights of the blocks over the ranks of their shard groups. Every rank calls it, when the model has
    its weights, adapters and recomputation. `values`: those that a WeightTaker has divided.
    """
    units = ShardedUnits(dict(model.named_parameters()), divided_entries(model, mesh), values=values)
    for name, block in blocks_of(model):
        if name in units.units:
            block.forward = units.wrap(name, block.forward)
    model.units = units
