"""Marks at the boundaries of a model's layers, in the forward and in the backward pass."""

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn

from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import Embedding
from erniekit.models.resampler import Resampler
from erniekit.models.vision import VisionTransformer
from erniekit.moe.experts import Experts
from erniekit.moe.layer import MoELayer
from erniekit.moe.router import Gate
from erniekit.nn.attention import SelfAttention
from erniekit.nn.mlp import SwiGLU
from erniekit.nn.norm import RMSNorm
from erniekit.training.profiling.recorder import BACKWARD, FORWARD, RECOMPUTE, Recorder

# The parts that a profile tells apart. What is in none of them belongs to the one around it: the products of attention
# to the projections, routing and permutation to the sparse layer.
NAMES: dict[type[nn.Layer], str] = {
    Embedding: "embedding",
    RMSNorm: "norm",
    SelfAttention: "attention",
    SwiGLU: "feed-forward",
    MoELayer: "sparse layer: permute, sum",
    Gate: "router",
    Experts: "experts",
    VisionTransformer: "vision transformer",
    Resampler: "resampler",
}
PROJECTIONS, SHARED = "attention projections", "shared experts"
_MARKED = "_profiled"  # set on tensors that have a hook


def watch(model: CausalLM, recorder: Recorder) -> list[Any]:
    """Mark the boundaries of all named parts of the model. Returns the hooks' handles, whose `remove` ends that."""
    handles = []
    for name, number, layer in parts_of(model):
        handles.append(layer.register_forward_pre_hook(_at_entry(recorder, name, number)))
        handles.append(layer.register_forward_post_hook(_at_exit(recorder, name, number)))
    return handles


def parts_of(model: CausalLM) -> list[tuple[str, int, nn.Layer]]:
    """(name, number of the decoder layer or -1, layer) of each named part of the model."""
    numbers = {id(inner): n for n in model.model.layers.numbers for inner in model.model.layers[n].sublayers()}
    names = _part_names(model)
    whole = (layer for layer in model.sublayers() if isinstance(layer, VisionTransformer | Resampler))
    skipped = {id(inner) for layer in whole for inner in layer.sublayers()}
    return [
        (names[id(layer)], numbers.get(id(layer), -1), layer)
        for layer in model.sublayers()
        if id(layer) in names and id(layer) not in skipped
    ]


def _part_names(model: CausalLM) -> dict[int, str]:
    """The parts' names by the identity of their layers."""
    names: dict[int, str] = {}
    for layer in model.sublayers():
        if isinstance(layer, SelfAttention):
            names |= {id(layer.qkv_proj): PROJECTIONS, id(layer.o_proj): PROJECTIONS}
        elif isinstance(layer, MoELayer) and layer.shared_experts is not None:
            names[id(layer.shared_experts)] = SHARED
        elif isinstance(layer, SwiGLU | Experts):
            # Their products, too: the finer the intervals, the less does one contain of another branch.
            own = names.setdefault(id(layer), NAMES[type(layer)])
            names |= {id(layer.up_gate_proj): own, id(layer.down_proj): own}
        if id(layer) not in names and type(layer) in NAMES:
            names[id(layer)] = NAMES[type(layer)]
    return names


def _at_entry(recorder: Recorder, name: str, number: int) -> Callable[..., None]:
    def hook(layer: nn.Layer, inputs: tuple[Any, ...]) -> None:
        around = recorder.around
        if around is not None and inputs:
            # What made the input belongs to the part around this one, unless another part made it.
            _on_gradient(inputs[0], recorder, around.name, around.layer)
        recorder.enter(name, number, RECOMPUTE if recorder.phase in (BACKWARD, RECOMPUTE) else FORWARD)

    return hook


def _at_exit(recorder: Recorder, name: str, number: int) -> Callable[..., None]:
    def hook(layer: nn.Layer, inputs: tuple[Any, ...], outputs: Any) -> None:
        recorder.leave()
        _on_gradient(outputs[0] if isinstance(outputs, tuple) else outputs, recorder, name, number)

    return hook


def _on_gradient(x: Any, recorder: Recorder, name: str, number: int) -> None:
    """When the backward pass comes to the operation that made x, the time belongs to a part. Paddle calls a tensor's
    hook just before that operation's gradient is computed.
    """
    if isinstance(x, paddle.Tensor) and not x.stop_gradient and not x.is_leaf and _MARKED not in vars(x):
        vars(x)[_MARKED] = True
        x.register_hook(lambda _: recorder.switch(name, number))
