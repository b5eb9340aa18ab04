"""Attaches adapters from directories to models in memory, and saves them."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle

from erniekit.checkpoint.model_dir import staged
from erniekit.checkpoint.peft_read import StoredAdapter, read_adapter
from erniekit.checkpoint.peft_write import adapter_parameters, write_adapter
from erniekit.lora import LoraState, attach_slots, describe, state_of, take_off
from erniekit.lora.several import AdapterSet, adapter_set_of, add_adapter, empty_slots, fill_slots, put_together
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import to_numpy
from erniekit.moe.layer import MoELayer
from erniekit.nn.shard import named_shard_specs, shard
from erniekit.utils.errors import CheckpointError


def attach_stored(model: CausalLM, stored: StoredAdapter, dropout: float | None = None) -> LoraState:
    """Attach an adapter that was read (see `read_adapter`) to `model`, which has its weights and no adapter. Afterwards
    only the adapter is trained, with `dropout`, or the adapter's own.
    """
    options = stored.options if dropout is None else dataclasses.replace(stored.options, dropout=dropout)
    state = attach_slots(model, options, stored.slots, stored.saved)
    fill(model, stored)
    return state


def attach_several(model: CausalLM, stored: Mapping[str, StoredAdapter]) -> AdapterSet:
    """Attach adapters by name to `model`, which has its weights and no adapter, so that each row of a batch may use
    another (see lora.several). They train nothing whole, and adapt only the layers of the decoder.
    """
    taken = {}
    for name, adapter in stored.items():
        attach_stored(model, adapter, dropout=0.0)
        taken[name] = take_off(model)
    chosen = put_together(model, taken)
    for layer in model.sublayers():
        if isinstance(layer, MoELayer):
            layer.on_routing = chosen.note_routing
    return chosen


def attach_another(model: CausalLM, name: str, stored: StoredAdapter) -> None:
    """Attach one more adapter to those of `attach_several`, or the first one, while no pass runs."""
    if adapter_set_of(model) is None:
        attach_several(model, {name: stored})
        return
    others = empty_slots(model)
    try:
        attach_stored(model, stored, dropout=0.0)
        taken = take_off(model)
    finally:
        fill_slots(model, others)
    add_adapter(model, name, taken)


def load_adapter(model: CausalLM, directory: str | Path, into: Mapping[str, paddle.Tensor] | None = None) -> None:
    """Set the adapter that `model` has, or tensors `into` under its names (an average), to the one in `directory`,
    which must adapt the same projections with the same ranks and scalings. CheckpointError with what differs.
    """
    state = state_of(model)
    assert state is not None, "the model has no adapter"
    stored = read_adapter(directory, model.config)
    stored_state = LoraState(stored.options, stored.slots, stored.saved)
    if _compared_facts(stored_state) != _compared_facts(state):
        raise CheckpointError(
            f"{directory} holds another adapter than the configuration asks for.\n  There: {describe(stored_state)}\n"
            f"  Expected: {describe(state)}\nSet the LoRA keys as they were, or give this run another output_dir."
        )
    fill(model, stored, into)


def _compared_facts(state: LoraState) -> object:
    """What must be equal for the tensors of one adapter to fit another. Scalings are rounded, as files store alpha."""
    slots = {(m, p): (s.rank, round(s.scaling, 5)) for m, parts in state.slots.items() for p, s in parts.items()}
    return slots, set(state.saved), state.options.dora


def fill(model: CausalLM, stored: StoredAdapter, into: Mapping[str, paddle.Tensor] | None = None) -> None:
    """Set the parameters of `model` (or `into`) from an adapter; a sharded model sets its shards."""
    parameters, shard_specs = dict(model.named_parameters()) if into is None else into, named_shard_specs(model)
    for name, array in stored.tensors.items():
        if name in parameters:
            spec = shard_specs.get(name)
            local = array if spec is None else np.ascontiguousarray(shard(array, spec, *model.shard.share(spec)))
            parameters[name].set_value(paddle.to_tensor(local).astype(parameters[name].dtype))


def save_adapter(model: CausalLM, directory: str | Path) -> None:
    """Write the adapter of a whole model to `directory` in PEFT's format (see `write_adapter`): complete, or as it was
    before.
    """
    state = state_of(model)
    assert state is not None, "the model has no adapter"
    parameters = dict(model.named_parameters())

    def arrays() -> Iterator[np.ndarray]:
        for name in adapter_parameters(state):
            yield to_numpy(parameters[name])

    with staged(Path(directory).expanduser()) as staging:
        write_adapter(staging, state, model.config, arrays())
