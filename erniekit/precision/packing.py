"""How codes lie in weight files, in numpy: from unpacked codes and back. One code is one int8 element elsewhere."""

import numpy as np


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of 4 or 8 bits, signed, as compressed-tensors packs them: int32 [out, ceil(in * bits / 32)].

    A code is stored plus 2^(bits - 1); that of input i takes the bits from i * bits on of its row, the lowest first.
    """
    unsigned = (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    per_word = 32 // bits
    if missing := -codes.shape[1] % per_word:
        unsigned = np.pad(unsigned, ((0, 0), (0, missing)))
    data = unsigned if bits == 8 else unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return np.ascontiguousarray(data).view("<i4")


def unpack_words(words: np.ndarray, bits: int, num_in: int) -> np.ndarray:
    """The inverse of `pack_words`: int8 [out, num_in]."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
    return (data[:, :num_in].astype(np.int16) - (1 << bits - 1)).astype(np.int8)
