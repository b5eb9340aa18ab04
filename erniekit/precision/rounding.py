"""Rounding to bf16, fp16 and the two 8-bit floating-point formats, exactly, in numpy. Every other implementation is
compared with this one.

All of them round to the nearest value, ties to the one with an even mantissa, and have subnormals. They differ in what
lies beyond the largest value: bf16 and fp16 go to infinity as IEEE 754 says, while the 8-bit formats saturate, infinity
included, as conversions on NVIDIA's GPUs do (SATFINITE). NaN stays NaN everywhere.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16

FormatName = Literal["bf16", "fp16", "e4m3", "e5m2"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: `mantissa_bits` behind the leading one, normal numbers from 2**`min_exponent` to
    `largest`. Below, values are multiples of 2**(min_exponent - mantissa_bits). `saturates`: values beyond `largest`
    become `largest` instead of infinity.
    """

    mantissa_bits: int
    min_exponent: int
    largest: float
    saturates: bool

    @property
    def smallest(self) -> float:
        """The smallest positive value, which is subnormal; what is at most half of it becomes zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)


FORMATS: dict[str, Format] = {
    "bf16": Format(7, -126, (2 - 2.0**-7) * 2.0**127, saturates=False),
    "fp16": Format(10, -14, 65504.0, saturates=False),
    "e4m3": Format(3, -6, 448.0, saturates=True),
    "e5m2": Format(2, -14, 57344.0, saturates=True),
}


def round_to(values: np.ndarray, name: FormatName) -> np.ndarray:
    """`values` (floating, any shape) rounded once to a format: float32 of the same shape, which holds every value of
    each format exactly.
    """
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"round_to takes a floating-point array, not {values.dtype}.")
    exact = values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
    if name == "bf16" and exact.dtype == np.float32:
        return bf16_to_fp32(fp32_to_bf16(exact))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # "invalid": a signalling NaN becomes quiet
        return exact.astype(np.float16).astype(np.float32) if name == "fp16" else _rounded(exact, FORMATS[name])


def _rounded(values: np.ndarray, to: Format) -> np.ndarray:
    """Scale by a power of two so that the format's values become integers, round, and scale back. Each scaling is
    exact, because `values` has more exponent range than the format has.
    """
    inside = np.clip(values, -to.largest, to.largest) if to.saturates else values
    exponent = np.maximum(np.frexp(inside)[1] - 1, to.min_exponent) - to.mantissa_bits
    return np.ldexp(np.rint(np.ldexp(inside, -exponent)), exponent).astype(np.float32)
