"""Which parts of a decoder are computed again in the backward pass, to keep less."""

from collections.abc import Collection
from dataclasses import dataclass

import paddle
from paddle import nn

from erniekit.models.decoder import Decoder, DecoderLayer
from erniekit.nn.checkpointed import recomputed


@dataclass(frozen=True)
class RecomputeOptions:
    """`modules`: whole layers (layer), or of each layer its attention with the projections (attention), the attention
    between these (core_attn), dense feed-forward blocks (mlp), sparse ones (moe), of these only the routed experts
    (experts) or the shared ones (shared_experts); and blocks of the vision transformer (vision). `mtp` does the same to
    multi-token prediction. `not_in`: numbers of layers that keep everything. `draws_noise`, `offloads`: see
    nn/checkpointed.py.
    """

    modules: Collection[str] = ("layer", "vision")
    mtp: bool = False
    not_in: Collection[int] = ()
    draws_noise: bool = False
    offloads: bool = False


def apply(decoder: Decoder, options: RecomputeOptions) -> None:
    """Let the chosen parts recompute themselves."""
    if "vision" in options.modules and decoder.vision_model is not None:
        for block in decoder.vision_model.blocks:
            _recompute(block, options)
    layers = [decoder.layers[number] for number in decoder.layers.numbers if number not in options.not_in]
    for layer in [*layers, *(decoder.mtp_block if options.mtp else [])]:
        _apply_to(layer, options)


def _apply_to(layer: DecoderLayer, options: RecomputeOptions) -> None:
    modules = options.modules
    if "layer" in modules:
        _recompute(layer, options)
        return
    if "attention" in modules:
        _recompute(layer.self_attn, options)
    elif "core_attn" in modules:
        attention = layer.self_attn
        attention.core = recomputed(attention.core, options.draws_noise, options.offloads)  # type: ignore[method-assign]
    if not layer.sparse:
        if "mlp" in modules:
            _recompute(layer.mlp, options)
    elif "moe" in modules:
        _recompute(layer.mlp, options)
    else:
        for experts in layer.mlp.all_experts() if "experts" in modules else ():
            _recompute(experts, options)
        if "shared_experts" in modules and layer.mlp.shared_experts is not None:
            _recompute(layer.mlp.shared_experts, options)


def _recompute(layer: nn.Layer, options: RecomputeOptions) -> None:
    layer.forward = recomputed(layer.forward, options.draws_noise, options.offloads)


def offload_line() -> str:
    """What offload_activations does on the device in use."""
    if paddle.get_device() == "cpu":
        return "offload_activations: saved inputs are copied, but a CPU has no other memory: nothing is saved here"
    return "offload_activations: the inputs of recomputed modules wait in pinned host memory"
