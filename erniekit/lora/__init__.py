"""LoRA: small trained factors in addition to frozen weights, attached to an existing model.

`attach(model, options)` attaches adapters to the projections and freezes everything else; `disabled(model)` is a
context with the base model; `merge(model)` adds the adapters to the weights. Their files are written by
erniekit/checkpoint/peft_write.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import nn

from erniekit.lora.layers import Adapter, LinearAdapter, Slot, StackedAdapter, mergeable_weight, parameter_name
from erniekit.lora.targets import (
    adaptable,
    choose,
    choose_saved,
    default_targets,
    has_vision,
    is_stacked,
    short_name,
)
from erniekit.nn.linear import Linear, Projection
from erniekit.nn.roles import Role, named_roles
from erniekit.nn.shard import ShardSpec, shard
from erniekit.utils import log
from erniekit.utils.arrays import seeded_generator
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of

__all__ = [
    "LoraOptions",
    "LoraState",
    "Slot",
    "attach",
    "attach_slots",
    "check_rank",
    "choose_slots",
    "describe",
    "disabled",
    "merge",
    "parameter_names",
    "state_of",
    "take_off",
    "unload",
]


@dataclass(frozen=True)
class LoraOptions:
    """The options of adapters. `rank` r and `alpha` give the scaling alpha / r, with `rslora` alpha / sqrt(r).
    `dropout` is applied to the adapters' input while training. `targets` and `modules_to_save` are explained in
    targets.choose and choose_saved; no targets: those of targets.default_targets. `seed` decides the initial values of
    A.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    seed: int = 42

    @property
    def scaling(self) -> float:
        """The scaling s of W + s A B."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass
class LoraState:
    """What is attached to a model: the options, the adapters of the whole model (projection -> part -> slot), of which
    this process may hold only some, and the parameters that are trained whole (`saved`) with the values that they had
    before (`originals`). `base` is the name of the base model that files state, `base_fingerprint` identifies its
    weights (see checkpoint.peft_write).
    """

    options: LoraOptions
    slots: dict[str, dict[str, Slot]]
    saved: tuple[str, ...]
    originals: dict[str, paddle.Tensor] = field(default_factory=dict)
    base: str | None = None
    base_fingerprint: str | None = None


_ABSURD = 16  # how many times the width of every adapted projection a rank is taken for a mistake
_STATE = "lora_state"  # the name of a plain attribute of the model
_Share = Callable[[ShardSpec], tuple[int, int]]


def state_of(model: nn.Layer) -> LoraState | None:
    """The adapter of `model`, or None for a plain model."""
    return vars(model).get(_STATE)


def attach(
    model: nn.Layer,
    options: LoraOptions,
    names: Iterable[str] | None = None,
    tied: bool = False,
    share: _Share = lambda spec: (0, 1),
) -> LoraState:
    """Attach new adapters to the projections that `options` name. From then on only these and modules_to_save are
    trained.

    `model` already has its weights. Where it is one shard of a model, `names` are the weights of the whole model, and
    `share` gives this process's share (index, count) of a sharded parameter. `tied`: the head is the embedding. A is
    uniform in +-1 / sqrt(in), as in PEFT, and follows from (seed, name, expert), whatever the layout. B is 0, so that
    the adapted model starts as the base. Raises ConfigError (see targets.choose).
    """
    known = [name for name, _ in model.named_parameters()] if names is None else names
    slots, saved = choose_slots(known, options, tied)
    state = attach_slots(model, options, slots, saved)
    _draw(model, options.seed, share)
    return state


def choose_slots(
    names: Iterable[str], options: LoraOptions, tied: bool
) -> tuple[dict[str, dict[str, Slot]], tuple[str, ...]]:
    """The adapters (projection -> part -> slot) and the parameters that are trained whole, of a model whose weights
    have these `names`. No model is needed, so that a wrong name is found early. Raises ConfigError (see
    targets.choose).
    """
    known = list(names)
    slot = Slot(options.rank, options.scaling)
    chosen = choose(known, options.targets or default_targets(known))
    saved = choose_saved(known, options.modules_to_save, tied)
    slots = {module: dict.fromkeys(parts, slot) for module, parts in chosen.items()}
    if options.dora:
        _refuse_dora(known, slots)
    return slots, saved


def check_rank(rank: int, slots: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Warn of a rank above the width of every adapted projection (`slots`, of weights of these `shapes`), which PEFT
    allows and which adds nothing to what the adapters can learn; ConfigError for one that can only be a mistake.
    """
    width, name = max(((min(shapes[f"{module}.weight"][-2:]), module) for module in slots), default=(rank, ""))
    if rank <= width:
        return
    text = (
        f"lora_rank: {rank} is above the width of every projection that is adapted; the widest is {name} with {width}"
    )
    if rank > _ABSURD * width:
        raise ConfigError(f"{text}. Set lora_rank to at most {width}; 8 to 64 are common.")
    log.once(f"{text}. The ranks above it take memory and add nothing to what can be learnt")


def attach_slots(
    model: nn.Layer,
    options: LoraOptions,
    slots: dict[str, dict[str, Slot]],
    saved: tuple[str, ...],
    values: bool = True,
) -> LoraState:
    """Attach adapters that are zero to those projections of `slots` that `model` has, and freeze everything else.
    Without `values` the model has no weights (build.outline), so none is measured or kept.
    """
    assert state_of(model) is None, "the model already has an adapter"
    state = LoraState(options, slots, saved)
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = name not in saved
        if name in saved and values:
            state.originals[name] = parameter.detach().clone()
    # The weights of a quantised base have no floating type; norms have the type in which the model computes.
    roles = named_roles(model)
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if roles[name] is Role.NORM)
    for name, layer in list(model.named_sublayers()):
        if not isinstance(layer, Projection) or name not in slots:
            continue
        if isinstance(layer, Linear):
            adapter: Adapter = LinearAdapter(layer, slots[name], options.dropout, options.dora, dtype, values)
        else:
            adapter = StackedAdapter(layer, slots[name][""], options.dropout, dtype)
        adapter.training = layer.training
        layer.adapter = adapter
    vars(model)[_STATE] = state
    return state


def _refuse_dora(names: Iterable[str], slots: dict[str, dict[str, Slot]]) -> None:
    """Refuse DoRA where PEFT's files cannot express it: for stacked experts, and in a mixture of experts of text, where
    PEFT takes the names of dense layers and shared experts for those of experts, for all but attention.
    """
    known = list(names)
    modules = adaptable(known)
    if not any(is_stacked(module) for module in modules):
        return
    sees_pictures = has_vision(known)
    wrong = [module for module in slots if is_stacked(module) or not (sees_pictures or ".self_attn." in module)]
    if wrong:
        what = "routed experts cannot have DoRA" if sees_pictures else "only attention can have DoRA"
        instead = r"qkv_proj,o_proj,spatial_linear.0,spatial_linear.2" if sees_pictures else "qkv_proj,o_proj"
        raise ConfigError(
            f"use_dora: {wrong[0]}: in a mixture of experts {what} (so it is in PEFT, too). Set lora_target_modules "
            f"without them, such as {instead}, or use_dora: False."
        )


def parameter_names(module: str, parts: Iterable[str], dora: bool = False) -> list[str]:
    """The names, in the model, of the parameters of a projection's adapters."""
    kinds = ("A", "B", "magnitude") if dora else ("A", "B")
    return [f"{module}.adapter.{parameter_name(kind, part)}" for part in parts for kind in kinds]


def describe(state: LoraState) -> str:
    """A short text for the log: adapted projections by kind, rank, scaling, and what is trained whole."""
    slots = [slot for parts in state.slots.values() for slot in parts.values()]
    leaves = sorted({short_name(name) for name in state.slots})
    ranks = ", ".join(str(rank) for rank in sorted({slot.rank for slot in slots}))
    scalings = ", ".join(f"{scaling:g}" for scaling in sorted({slot.scaling for slot in slots}))
    dora = ", DoRA" if state.options.dora else ""
    saved = f", whole: {', '.join(state.saved)}" if state.saved else ""
    return (
        f"{count_of(len(state.slots), 'projection')} ({', '.join(leaves)}), "
        f"rank {ranks}, scaling {scalings}{dora}{saved}"
    )


def adapters(model: nn.Layer) -> Iterator[tuple[str, Projection, Adapter]]:
    """(name of the projection, projection, adapter) of every adapter."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, Projection) and isinstance(layer.adapter, Adapter):
            yield name, layer, layer.adapter


@paddle.no_grad()
def _draw(model: nn.Layer, seed: int, share: _Share) -> None:
    """Draw the initial values of every A (He et al. 2015 with a = sqrt(5): bound 1 / sqrt(in))."""
    for name, _, adapter in adapters(model):
        shard_specs = adapter.shard_specs()
        for part in adapter.slots:
            a, local_name = adapter.factors(part)[0], parameter_name("A", part)
            full, spec = f"{name}.adapter.{local_name}", shard_specs.get(local_name)
            index, count = (0, 1) if spec is None else share(spec)
            if len(a.shape) == 3:
                first = index * a.shape[0]
                value = np.stack([_uniform(seed, f"{full}.{first + e}", a.shape[1:]) for e in range(a.shape[0])])
            else:
                whole = _uniform(seed, full, [a.shape[0] * count, a.shape[1]])
                value = whole if spec is None else shard(whole, spec, index, count)
            a.set_value(paddle.to_tensor(value).astype(a.dtype))


def _uniform(seed: int, name: str, shape: list[int]) -> np.ndarray:
    uniform = seeded_generator(seed, name).random(shape, dtype=np.float32)
    return ((2 * uniform - 1) / np.sqrt(np.float32(shape[0]))).astype(np.float32)


@contextmanager
def disabled(model: nn.Layer) -> Iterator[nn.Layer]:
    """Give the base model: adapters switched off, modules_to_save as they were before training. This is for forward
    passes only. Afterwards the trained state is restored bit for bit.
    """
    state = state_of(model)
    assert state is not None, "the model has no adapter"
    switched = [adapter for _, _, adapter in adapters(model) if adapter.enabled]
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].detach().clone() for name in state.originals}
    try:
        for adapter in switched:
            adapter.enabled = False
        for name, original in state.originals.items():
            parameters[name].set_value(original)
        yield model
    finally:
        for adapter in switched:
            adapter.enabled = True
        for name, value in trained.items():
            parameters[name].set_value(value)


@paddle.no_grad()
def merge(model: nn.Layer) -> None:
    """Add the adapters to the weights, computed in fp32. Afterwards `model` is a plain model.

    Raises UserError where the base is quantised.
    """
    for name, layer, adapter in list(adapters(model)):
        weight = mergeable_weight(layer, name)
        assert isinstance(adapter, LinearAdapter | StackedAdapter)
        weight.set_value(adapter.merged(weight).astype(weight.dtype))
    unload(model)


def unload(model: nn.Layer) -> None:
    """Remove the adapters and make every weight trainable again. Parameters of modules_to_save keep their trained
    values.
    """
    for _, layer, _ in list(adapters(model)):
        layer.adapter = None
    vars(model).pop(_STATE, None)
    for parameter in model.parameters():
        parameter.stop_gradient = False


def take_off(model: nn.Layer) -> dict[str, Adapter]:
    """Empty the adapter slots of `model`, whose weights stay frozen -> projection -> the adapter that was there."""
    taken = {name: adapter for name, _, adapter in adapters(model)}
    for _, layer, _ in list(adapters(model)):
        layer.adapter = None
    vars(model).pop(_STATE, None)
    return taken
