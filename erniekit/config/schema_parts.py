"""Keys about which parts of a model are trained, and how fast."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.config.values import split_patterns, split_words

FREEZE_VISION, FREEZE_LM = "freeze_vision", "freeze_lm"


@dataclass(frozen=True, kw_only=True)
class PartsArgs:
    """Which parameters a run leaves as they are, and the learning rates of parts of a vision-language model."""

    group: ClassVar[str] = "parts of the model"

    freeze_config: tuple[str, ...] = list_of(
        str,
        "freeze_vision: the vision transformer is not trained; freeze_lm: the decoder is not, but for its vision "
        "experts and their routers. Both may be given.",
        choices=(FREEZE_VISION, FREEZE_LM),
        split=split_words,
    )
    frozen_parameters: tuple[str, ...] = list_of(
        str,
        "More parameters that are not trained: vision_transformer, resampler, vision_experts, language, or regular "
        "expressions for whole names of parameters.",
        split=split_patterns,
    )
    vit_lr_ratio: float | None = key(
        None,
        "Learning rate of block i of the vision transformer's n: this ratio to the power n-1-i; the patch embedding "
        "counts as block 0, and the final norm has 1. null: visual_ld, else 1.",
        gt=0,
    )
    visual_ld: float | None = key(None, "The value of vit_lr_ratio where that is not given.", gt=0)
    resampler_lr_ratio: float | None = key(
        None, "The resampler's learning rate as a share of the others'; null: 1.", ge=0
    )
