"""Keys of quantisation-aware training."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key

STATIC = "fp8_static"
WITH_RANGES = (STATIC, "w4a8")  # inputs have ranges that move, and rotations
QAT_SCHEMES = ("w8a8", "fp8", STATIC, "w4a8", "wint4", "wint8", "wint4/8")
# What ERNIEKit's fp8linear, a8w8linear and a8w4linear become as a compute_type, and the schemes that they stand for.
QAT_COMPUTE_TYPES = {"fp8": STATIC, "w8a8": "w8a8", "w4a8": "w4a8"}


@dataclass(frozen=True, kw_only=True)
class QatArgs:
    """Training for a scheme in which the model will be exported; see docs/quantisation-training.md. Read only with
    qat.
    """

    group: ClassVar[str] = "quantisation-aware training"

    qat: str = key(
        "none",
        "Train for a scheme: products round as the exported model's do. w8a8; fp8 (blocks of 128 x 128); fp8_static "
        "(scales of matrices: ERNIEKit's fp8linear); w4a8 (experts); weights alone: wint4, wint8, wint4/8.",
        choices=("none", *QAT_SCHEMES),
    )
    apply_hadamard: bool = key(
        True,
        "Multiply inputs by Hadamard matrices in blocks, and weights by their inverse, where FastDeploy's kernels do: "
        "all of them with qat: fp8_static, down_proj of experts with w4a8.",
    )
    hadamard_block_size: int | None = key(
        None,
        "The order of the Hadamard matrices, a power of two; null: FastDeploy's, 32 with fp8_static and 128 with w4a8.",
        ge=2,
        le=4096,
    )
    apply_online_actscale_step: int = key(
        200,
        "With qat: fp8_static or w4a8: for this number of steps inputs are rounded with the scale of the present "
        "inputs, and their mean range is kept.",
        ge=1,
    )
    actscale_moving_rate: float = key(
        0.01,
        "With qat: fp8_static or w4a8: the share of a step's range in the kept range after these steps.",
        gt=0,
        le=1,
    )
    quant_input_grad: bool = key(
        False, "Round the gradients of products to E5M2 where they give the gradients of inputs."
    )
    quant_weight_grad: bool = key(
        False, "Round the gradients of products to E5M2 where they give the gradients of weights."
    )
    qat_distill_weight: float = key(
        0.0,
        "The share d of distillation in the loss: (1 - d) * cross-entropy + d * KL to the predictions of the model "
        "before training, unquantised, which needs its memory once more.",
        ge=0,
        le=1,
    )
