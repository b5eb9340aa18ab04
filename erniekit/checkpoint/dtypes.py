"""Element types of weight files as numpy arrays.

numpy has no bfloat16: such tensors are uint16 arrays of their bits (erniekit/utils/bfloat16.py).
"""

import numpy as np

from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16
from erniekit.utils.errors import CheckpointError

# Name in a safetensors header -> numpy type of its storage. Types that numpy lacks are bits of the same width.
STORAGE: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
# Name in a config.json or on the command line -> name in a safetensors header.
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
LONG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_BLOCK = 1 << 18  # elements at a time: with their temporaries they stay in the second cache of a core


def header_name(dtype: str) -> str:
    """The name of a dtype (`float32`, `bfloat16`, `float16`, `fp32`, ...) in a safetensors header."""
    if dtype not in NAMES:
        raise CheckpointError(f"unknown weight dtype {dtype!r}: use one of {', '.join(NAMES)}.")
    return NAMES[dtype]


def to_fp32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert a tensor as read from a file, with its header type, to float32; exact except for F64."""
    if dtype not in FLOATS:
        raise CheckpointError(f"tensors of type {dtype} are not floating point weights.")
    if dtype == "BF16":
        return bf16_to_fp32(values)
    return values.astype(np.float32, copy=False)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no element of a tensor of a floating header type, as read from a file, is NaN or infinite."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
    if dtype != "BF16":
        return all(bool(np.isfinite(block).all()) for block in blocks)
    # Exponents of ones alone are those of NaN and infinity.
    return all(int((block & 0x7F80).max()) < 0x7F80 for block in blocks)


def convert(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Convert `values` from one header type to another. The same type returns the same array, bit for bit.

    Raises CheckpointError where a finite value would become infinite (float16 ends at 65504).
    """
    if source == target:
        return values
    if target not in FLOATS:
        raise CheckpointError(f"weights cannot be stored as {target}.")
    wide = to_fp32(values, source)
    if target == "BF16":
        return fp32_to_bf16(wide)
    with np.errstate(over="ignore"):
        out = wide.astype(STORAGE[target])
    if target == "F16" and np.isinf(out).any() and (np.isinf(out) & np.isfinite(wide)).any():
        raise CheckpointError("a value is beyond the range of float16 (65504): use bfloat16 or float32.")
    return out


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The number of bytes of a tensor in a file."""
    size = STORAGE[dtype].itemsize
    for length in shape:
        size *= length
    return size
