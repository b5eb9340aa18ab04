"""How codes lie in weight files, in numpy: from unpacked codes and back. One code is one int8 element elsewhere."""

from functools import lru_cache

import numpy as np


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of 4 or 8 bits, signed, as compressed-tensors packs them: int32 [out, ceil(in * bits / 32)].

    A code is stored plus 2^(bits - 1); that of input i takes the bits from i * bits on of its row, the lowest first.
    """
    unsigned = codes.view(np.uint8) + np.uint8(1 << bits - 1)  # modulo 256
    if missing := -codes.shape[1] % (32 // bits):
        unsigned = np.pad(unsigned, ((0, 0), (0, missing)))
    data = unsigned if bits == 8 else _joined(unsigned)
    return np.ascontiguousarray(data).view("<i4")


def unpack_words(words: np.ndarray, bits: int, num_in: int) -> np.ndarray:
    """The inverse of `pack_words`: int8 [out, num_in]."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        data = _halves(data)
    return (data[:, :num_in] - np.uint8(1 << bits - 1)).view(np.int8)


def pack_input_pairs(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [out, in] with two successive inputs a byte: int8 [in / 2, out], the even input in the low half, in
    two's complement. FastDeploy's w4a8 experts, before a kernel orders them.
    """
    return np.ascontiguousarray(_joined(codes.view(np.uint8) & 15).T).view(np.int8)


def unpack_input_pairs(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_input_pairs`: int8 [out, in]."""
    halves = _halves(np.ascontiguousarray(packed.T).view(np.uint8))
    return (halves << 4).view(np.int8) >> 4


def pack_for_kernels(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] of 4 or 8 bits in the order that Paddle's weight-only GPU kernels read, the same for compute
    capabilities 7.5, 8.0, 8.6, 8.9 and 9.0: int8 [out * bits / 8, in]. `in` is a multiple of 64, `out` of 16.

    Inputs are permuted within tiles, those of several outputs interleaved in tiles of 64, and the codes, which become
    unsigned, permuted within words of 32 bits (paddle.nn.quant.weight_quantize, arch=80).
    """
    num_out, num_in = codes.shape
    assert num_in % 64 == 0 and num_out % 16 == 0, codes.shape
    woven = 16 // bits
    tiles = (codes.view(np.uint8) + np.uint8(1 << bits - 1)).reshape(num_out // woven, woven, num_in // 64, 64)
    stored = tiles.swapaxes(1, 2).reshape(-1, woven * 64)[:, np.argsort(kernel_order(bits))]
    data = stored if bits == 8 else _joined(stored)
    return np.ascontiguousarray(data).view(np.int8).reshape(num_out * bits // 8, num_in)


def unpack_for_kernels(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_for_kernels`: int8 [out, in]."""
    rows, num_in = packed.shape
    num_out, woven = rows * 8 // bits, 16 // bits
    data = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, 8 * bits * woven)
    stored = (data if bits == 8 else _halves(data))[:, kernel_order(bits)]
    codes = stored.reshape(num_out // woven, num_in // 64, woven, 64).swapaxes(1, 2).reshape(num_out, num_in)
    return (codes - np.uint8(1 << bits - 1)).view(np.int8)


@lru_cache(maxsize=2)
def kernel_order(bits: int) -> np.ndarray:
    """Where the codes of a tile of 16 / bits outputs by 64 inputs, output after output, lie in the order of
    `pack_for_kernels`: int64 [16 / bits * 64], counted in codes, of which a byte has its low half first.

    Inputs lie in the order of the kernels' tensor-core instructions, and those of a word of 32 bits so that a kernel
    converts several with few operations.
    """
    per_word, row = 32 // bits, np.arange(128 // bits)
    inputs = 8 * (row % per_word // 2) + row % 2 + 2 * (row // per_word)
    in_word = np.argsort([0, 2, 1, 3] if bits == 8 else [0, 2, 4, 6, 1, 3, 5, 7])
    places = np.arange(16 // bits * 64).reshape(-1, per_word)[:, in_word]
    return places.reshape(-1, len(row))[:, np.argsort(inputs)].reshape(-1)


def _joined(values: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of 0..15 -> uint8 [..., n / 2], the even ones in the low halves."""
    pairs = np.ascontiguousarray(values).view("<u2")  # even + 256 * odd
    return (pairs | pairs >> 4).astype(np.uint8)


def _halves(data: np.ndarray) -> np.ndarray:
    """The inverse of `_joined`."""
    pairs = data.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)
