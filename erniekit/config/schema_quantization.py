"""Keys of quantised models that engines load."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key

SCHEMES = ("wint4", "wint8", "wint4/8", "w8a8", "fp8", "w4a8", "wint2")
# PaddleFormers' words.
_WORDS = {"weight_only_int8": "wint8", "weight_only_int4": "wint4", "weight_only_mix": "wint4/8", "fp8linear": "fp8"}


@dataclass(frozen=True, kw_only=True)
class QuantizationArgs:
    """What `erniekit export` makes of the weights; see docs/quantisation.md."""

    group: ClassVar[str] = "quantization"

    quantization: str = key(
        "none",
        "Scheme of exported weights: wint4, wint8, wint4/8 (experts in 4 bits), w8a8, fp8, w4a8 or wint2; none: "
        "unquantised. Other commands read it as compute_type.",
        choices=("none", *SCHEMES, "nf4"),
        words=_WORDS,
    )
    quantization_group_size: int | None = key(
        None, "Inputs that share a scale in 4 bits; null: 128, 64 or 32, the first that the model's sizes allow.", ge=8
    )
    quantization_clip_search: bool = key(
        True, "Choose the scales of 4-bit codes by their error, instead of by the largest weight."
    )
