"""bfloat16 in numpy, which has no such type: uint16 arrays of its bits."""

import numpy as np

_BLOCK = 1 << 20  # elements of one pass: bounds the temporaries


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Exact: uint16 bits of bfloat16, any shape -> float32 of that shape."""
    out = np.empty(bits.shape, np.float32)
    source, words = np.ascontiguousarray(bits).reshape(-1), out.reshape(-1).view(np.uint32)
    for start in range(0, source.size, _BLOCK):
        words[start : start + _BLOCK] = source[start : start + _BLOCK]
        words[start : start + _BLOCK] <<= 16
    return out


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 of any shape -> uint16 bits of bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    out = np.empty(values.shape, np.uint16)
    source, bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32), out.reshape(-1)
    for start in range(0, source.size, _BLOCK):
        words = source[start : start + _BLOCK]
        is_nan = (words & 0x7FFFFFFF) > 0x7F800000
        # Adding half a unit (less one when the kept part is even) carries exactly where rounding goes up.
        rounded = (words + (0x7FFF + ((words >> 16) & 1))) >> 16
        # A NaN's payload could be rounded away to infinity; the quiet bit keeps it a NaN.
        bits[start : start + _BLOCK] = np.where(is_nan, (words >> 16) | 0x40, rounded)
    return out
