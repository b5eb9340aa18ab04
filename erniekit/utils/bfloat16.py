"""bfloat16 in numpy, which lacks the type: values are uint16 arrays with the bits."""

import numpy as np

_BLOCK = 1 << 16  # elements converted at a time: with their temporaries they stay in the second cache of a core


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Converts bfloat16 bits (uint16, any shape) to float32 of the same shape, exactly."""
    out = np.empty(bits.shape, np.float32)
    source, words = np.ascontiguousarray(bits).reshape(-1), out.reshape(-1).view(np.uint32)
    for start in range(0, source.size, _BLOCK):
        words[start : start + _BLOCK] = source[start : start + _BLOCK]
        words[start : start + _BLOCK] <<= 16
    return out


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Converts float32 (any shape) to bfloat16 bits (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    out = np.empty(values.shape, np.uint16)
    source, bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32), out.reshape(-1)
    for start in range(0, source.size, _BLOCK):
        words = source[start : start + _BLOCK]
        # Adding half a unit in the last place (one less if the upper half is even) carries exactly where rounding is
        # up.
        rounded = words >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += words
        rounded >>= 16
        is_nan = np.isnan(words.view(np.float32))
        if is_nan.any():
            # Rounding could turn a NaN with a small payload into infinity; setting the quiet bit prevents that.
            rounded = np.where(is_nan, (words >> 16) | 0x40, rounded)
        bits[start : start + _BLOCK] = rounded
    return out
