"""Which dtype parameters and products have, and what is said where a device cannot do what was asked."""

from dataclasses import dataclass

import paddle
from paddle import nn

from erniekit.precision.weight_only import SCHEMES, Schemes
from erniekit.utils import log


@dataclass(frozen=True)
class Policy:
    """`param_dtype` of the weights and products ("float32" or "bfloat16"); 16-bit weights have fp32 masters in the
    optimizer. `low_bit`: how the frozen weights of projections are held instead; None: as the others.
    """

    param_dtype: str
    low_bit: Schemes | None = None


def choose(compute_type: str, device: str) -> Policy:
    """The policy for a compute_type (bf16, fp32, or a key of weight_only.SCHEMES) on a device ("cpu", "gpu:0"), with a
    line where it is not what was asked.
    """
    low_bit = SCHEMES.get(compute_type)
    asked = "float32" if compute_type == "fp32" else "bfloat16"
    if asked != "float32" and device == "cpu":
        log.info(f"compute_type: {compute_type} computes in float32 here: Paddle has no 16-bit matrix product on a CPU")
        asked = "float32"
    return Policy(asked, low_bit)


def apply(model: nn.Layer, policy: Policy) -> None:
    """Cast the weights, but for those that stay fp32 in every model: routers' gates and correction biases."""
    if policy.param_dtype == "float32":
        return
    for name, parameter in model.named_parameters():
        if not name.endswith(".mlp.gate.weight"):
            parameter._to(dtype=policy.param_dtype)
    statics = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert all(buffer.dtype == paddle.float32 for buffer in statics)
