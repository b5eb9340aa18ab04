"""Which parts of a decoder are computed again in the backward pass, to keep less."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from erniekit.models.decoder import Decoder, DecoderLayer
from erniekit.nn.checkpointed import recomputed

Granularity = Literal["full", "full_attn", "core_attn", "moe"]


@dataclass(frozen=True)
class RecomputeOptions:
    """`granularity`: whole layers (full), their attention with its projections (full_attn), the attention between these
    (core_attn), or only sparse feed-forward layers (moe). `sparse` adds the latter to the two in the middle, `mtp` does
    the same to multi-token prediction. `not_in`: numbers of layers that keep everything. `draws_noise`: see
    nn/checkpointed.py.
    """

    granularity: Granularity = "full"
    sparse: bool = False
    mtp: bool = False
    not_in: Collection[int] = ()
    draws_noise: bool = False


def apply(decoder: Decoder, options: RecomputeOptions) -> None:
    """Let the chosen parts of the layers recompute themselves, and with whole layers the blocks of the vision
    transformer.
    """
    if options.granularity == "full" and decoder.vision_model is not None:
        for block in decoder.vision_model.blocks:
            block.forward = recomputed(block.forward, options.draws_noise)
    layers = [decoder.layers[number] for number in decoder.layers.numbers if number not in options.not_in]
    for layer in [*layers, *(decoder.mtp_block if options.mtp else [])]:
        _apply_to(layer, options)


def _apply_to(layer: DecoderLayer, options: RecomputeOptions) -> None:
    noise = options.draws_noise
    if options.granularity == "full":
        layer.forward = recomputed(layer.forward, noise)  # type: ignore[method-assign]
        return
    if options.granularity == "full_attn":
        layer.self_attn.forward = recomputed(layer.self_attn.forward, noise)  # type: ignore[method-assign]
    elif options.granularity == "core_attn":
        layer.self_attn.core = recomputed(layer.self_attn.core, noise)  # type: ignore[method-assign]
    if layer.sparse and (options.sparse or options.granularity == "moe"):
        layer.mlp.forward = recomputed(layer.mlp.forward, noise)  # type: ignore[method-assign]
