"""Keys of quantised models that engines load."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key
from erniekit.config.schema_data import DATASET_TYPES

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
    quantization_first_layers: int | None = key(
        None,
        "wint2: the number of first layers, counted with dense ones, whose experts have 4 bits; null: 7 of 54 in "
        "proportion, as in the published 300B-A47B model.",
        ge=0,
    )
    quantization_clip_search: bool = key(
        True,
        "Choose the scales of 4-bit codes by their error, instead of by the largest weight; always in 2 bits.",
    )
    quantization_algorithm: str = key(
        "rtn",
        "How codes are chosen: rtn (the nearest ones), or with calibration data gptq (errors are compensated), awq "
        "(inputs are scaled for 4 bits) or smoothquant (inputs are scaled for w8a8).",
        choices=("rtn", "gptq", "awq", "smoothquant"),
    )
    quantization_calibration_path: str | None = key(
        None,
        "Calibration data: a file, directory or Hub name, like training data, or a plain text (.txt).",
        path=True,
    )
    quantization_calibration_type: str = key("erniekit", "Format of the calibration records.", choices=DATASET_TYPES)
    quantization_calibration_samples: int = key(128, "Rows of calibration tokens.", ge=1)
    quantization_calibration_length: int = key(1024, "Tokens of a calibration row; documents are packed into it.", ge=2)
    quantization_calibrate_all_experts: bool = key(
        False, "Calibrate every expert with all tokens, instead of those that its router sends to it."
    )
    quantization_damping: float = key(
        0.01,
        "gptq: share of the mean of the Hessian's diagonal that is added to the diagonal; raised where that is too "
        "little.",
        ge=0,
    )
    quantization_act_order: bool = key(
        True, "gptq: round inputs with larger activations first; the file is the same for its readers."
    )
    quantization_smoothing: float = key(
        0.5, "smoothquant: how much of the activations' range moves into the weights.", ge=0, le=1
    )
    quantization_eval: bool = key(
        False,
        "Also evaluate the model before and the exported one after, as `erniekit eval` does (eval_dataset_path, "
        "predict_with_generate, ...), for quantization_report.json.",
    )
