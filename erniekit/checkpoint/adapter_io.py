"""Adapters of a model in memory, from and to directories."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle

from erniekit.checkpoint.adapter import adapter_parameters, write_adapter
from erniekit.checkpoint.adapter_read import StoredAdapter, read_adapter
from erniekit.checkpoint.folder import staged
from erniekit.lora import attach_slots, state_of
from erniekit.models.decoder import CausalLM
from erniekit.models.local import named_cuts
from erniekit.models.weights import to_numpy
from erniekit.nn.cut import take
from erniekit.utils.errors import CheckpointError

Gather = Callable[[str, paddle.Tensor], np.ndarray]


def attach_stored(model: CausalLM, directory: str | Path, model_dir: str | Path | None = None) -> StoredAdapter:
    """Hang the adapter in `directory` on `model`, a plain one with its weights (those of `model_dir`, if given). Only
    the adapter is trained from here on. Raises CheckpointError (see `read_adapter`).
    """
    stored = read_adapter(directory, model.config, model_dir)
    attach_slots(model, stored.options, stored.slots, stored.saved)
    fill(model, stored)
    return stored


def load_adapter(model: CausalLM, directory: str | Path) -> None:
    """Set the adapter that `model` has to the one in `directory`, which must adapt the same projections with the same
    ranks and scalings. CheckpointError with what differs.
    """
    state = state_of(model)
    assert state is not None, "the model has no adapter"
    stored = read_adapter(directory, model.config)
    if (
        stored.slots != state.slots
        or set(stored.saved) != set(state.saved)
        or stored.options.dora != state.options.dora
    ):
        theirs, ours = (
            _summary(stored.slots, stored.saved, stored.options.dora),
            _summary(state.slots, state.saved, state.options.dora),
        )
        raise CheckpointError(
            f"{directory} holds another adapter than the configuration asks for: {theirs}; asked for: {ours}."
        )
    fill(model, stored)


def fill(model: CausalLM, stored: StoredAdapter) -> None:
    """Set the parameters of `model` that an adapter holds; a part of a model takes its share."""
    parameters, cuts = dict(model.named_parameters()), named_cuts(model)
    for name, array in stored.tensors.items():
        if name in parameters:
            cut = cuts.get(name)
            share = array if cut is None else np.ascontiguousarray(take(array, cut, *model.part.share(cut)))
            parameters[name].set_value(paddle.to_tensor(share).astype(parameters[name].dtype))


def save_adapter(
    model: CausalLM, directory: str | Path, base: str | None = None, base_fingerprint: str | None = None
) -> None:
    """Write the adapter of a whole model to `directory` in PEFT's format (see `write_adapter`): complete, or as it was
    before.
    """
    state = state_of(model)
    assert state is not None, "the model has no adapter"
    parameters = dict(model.named_parameters())

    def arrays() -> Iterator[np.ndarray]:
        for name in adapter_parameters(state):
            yield to_numpy(parameters[name])

    with staged(directory) as staging:
        write_adapter(staging, state, model.config, arrays(), base, base_fingerprint)


def _summary(slots: dict, saved: tuple[str, ...], dora: bool) -> str:
    ranks = sorted({slot.rank for parts in slots.values() for slot in parts.values()})
    scalings = sorted({round(slot.scaling, 6) for parts in slots.values() for slot in parts.values()})
    leaves = sorted({name.rpartition(".")[2] for name in slots})
    return f"{len(slots)} projections ({', '.join(leaves)}), rank {ranks}, scaling {scalings}, modules_to_save {list(saved)}, dora {dora}"
