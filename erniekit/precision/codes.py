"""Weights in 8 or 4 bits as files keep them: scales, codes and back, in numpy. Every quantised file is made by this
rounding.

A weight is [out, in], as files of -PT have it: w = scale * code. The codes are whole numbers, or FP8 (E4M3) bytes.
Weights that share a scale are a tile: a channel, a group of consecutive inputs of a channel, a block, or the whole
matrix. A scale is rounded to the type in which the file keeps it before a weight is divided by it; otherwise some codes
would not be the nearest ones. A tile of zeros has scale 1, and so has one whose scale would be rounded to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from erniekit.precision import convolutional_code
from erniekit.precision.rounding import round_to

# Weights a step: with the temporaries of a step they stay in the third cache, and a step of numpy takes 0.1 ms or more,
# so that threads seldom wait for the interpreter.
_BLOCK = 1 << 19
# Candidates of the search: shares of a tile's largest magnitude.
_CLIPS = tuple(float(share) for share in np.arange(1.0, 0.375, -0.05))


@dataclass(frozen=True)
class CodeSpec:
    """How the weights of a matrix [out, in] become codes.

    `lowest`, `largest`: the values of the first and the last code; a tile's scale is its largest magnitude over half
    their difference. From -8 to 7 this is 7.5, as compressed-tensors has it: the step is smaller than with 7, and the
    largest weight is still within half a step. `group`: the number of inputs of a channel that share a scale; None: all
    of them. `block`: (out, in) of the weights that share a scale, instead.
    `whole`: all weights of the matrix do. At the ends of rows and columns, groups and blocks may be incomplete.
    `scale_type`: the type in which the scales are kept.
    """

    kind: Literal["int", "e4m3", "convolutional"]
    bits: int
    lowest: float
    largest: float
    group: int | None = None
    block: tuple[int, int] | None = None
    whole: bool = False
    scale_type: Literal["bf16", "fp16", "fp32"] = "bf16"

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out, in) of the weights that share a scale, in a matrix of this shape."""
        if self.whole:
            return shape
        return self.block or (1, self.group or shape[1])

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of a matrix: [out, groups] of channels, or the numbers of blocks."""
        if self.kind == "convolutional":
            return shape[0], convolutional_code.scale_columns(shape[1])
        rows, columns = self.tile(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)


def full_range(bits: int, group: int | None = None) -> CodeSpec:
    """Whole numbers with every code of `bits` bits, -8 to 7 of 4; bf16 scales of channels, or of groups of inputs."""
    return CodeSpec("int", bits, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, group)


def symmetric(bits: int, group: int | None = None, scale_type: Literal["bf16", "fp32"] = "bf16") -> CodeSpec:
    """Whole numbers as many below 0 as above, -7 to 7 of 4 bits; scales of channels, or of groups of inputs."""
    largest = 2.0 ** (bits - 1) - 1
    return CodeSpec("int", bits, -largest, largest, group, scale_type=scale_type)


# The convolutional code of FastDeploy's wint2: codes uint8 [out, in / 4], scales [out, in / 64 + 3]; see
# precision.convolutional_code. In what follows it does not use tiles.
WINT2 = CodeSpec("convolutional", 2, -32.0, 31.0, convolutional_code.GROUP)
FP8_BLOCK = CodeSpec("e4m3", 8, -448.0, 448.0, block=(128, 128), scale_type="fp32")
FP8_CHANNEL = CodeSpec("e4m3", 8, -448.0, 448.0)
FP8_TENSOR = CodeSpec("e4m3", 8, -448.0, 448.0, whole=True, scale_type="fp32")


def choose_scales(
    weight: np.ndarray, spec: CodeSpec, search: bool = False, importance: np.ndarray | None = None
) -> np.ndarray:
    """The scales of `weight` [out, in] (floating): `spec.scale_shape`, fp32 holding values of `spec.scale_type`.

    `search`: besides a tile's scale (see CodeSpec), smaller ones down to 0.4 times it are tried; the one is taken for
    which the sum of importance * (w - w')^2 over the tile is least. `importance` [in] >= 0 is the mean square of each
    input; None: 1. Raises ValueError where a weight is not finite.
    """
    shape = _matrix(weight)
    if spec.kind == "convolutional":
        return convolutional_code.choose_scales(weight, importance).to_array()
    scales = np.empty(spec.scale_shape(shape), np.float32)
    if spec.whole:
        largest = np.max([_largest(tiles) for _, _, tiles in _blocks(weight, spec)], initial=0.0)
        scales[...] = _stored(np.full((1, 1), largest, np.float32), spec)
        return scales
    weights = None if importance is None else np.asarray(importance, np.float32)[None]
    for _, rows, tiles in _blocks(weight, spec):
        largest = _largest(tiles)
        scales[rows] = _stored(largest, spec)
        if search:
            row = None if weights is None else _tiles(weights, (1, spec.tile(shape)[1]))
            _search(tiles, largest, scales[rows], spec, row)
    return scales


def encode(weight: np.ndarray, scales: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """The nearest codes of `weight` [out, in] (floating) with `scales` of `choose_scales`: int8 [out, in], or the bytes
    of E4M3 numbers, uint8 [out, in]. What is beyond the largest code becomes the largest; halves go to the even code.
    """
    shape = _matrix(weight)
    assert scales.shape == spec.scale_shape(shape), (scales.shape, shape, spec)
    if spec.kind == "convolutional":
        return convolutional_code.encode(weight, convolutional_code.Scales.from_array(scales))
    codes = np.empty(shape, _code_type(spec))
    for span, rows, tiles in _blocks(weight, spec):
        _encode_tiles(tiles, scales[rows], spec, codes[span])
    return codes


def quantise(weight: np.ndarray, spec: CodeSpec, search: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of `weight`: `choose_scales` and `encode` in one pass over the weights, where scales are not of
    the whole matrix.
    """
    shape = _matrix(weight)
    if spec.kind == "convolutional" or spec.whole:
        scales = choose_scales(weight, spec, search)
        return encode(weight, scales, spec), scales
    codes, scales = np.empty(shape, _code_type(spec)), np.empty(spec.scale_shape(shape), np.float32)
    for span, rows, tiles in _blocks(weight, spec):
        largest = _largest(tiles)
        scales[rows] = _stored(largest, spec)
        if search:
            _search(tiles, largest, scales[rows], spec, None)
        _encode_tiles(tiles, scales[rows], spec, codes[span])
    return codes, scales


def squared_error(weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, spec: CodeSpec) -> tuple[float, float]:
    """Of `weight` [out, in] fp32 and what codes and scales stand for: the sum of (w' - w)^2, and that of w^2."""
    squared = total = 0.0
    if spec.kind == "convolutional":
        lost = decode(codes, scales, spec)
        lost -= weight
        return float(np.vdot(lost, lost)), float(np.vdot(weight, weight))
    shape = _matrix(codes)
    for span, rows, _ in _spans(shape, spec):
        part, lost = weight[span], _decode_rows(codes[span], scales[rows], spec, shape)
        lost -= part
        squared += float(np.vdot(lost, lost))
        total += float(np.vdot(part, part))
    return squared, total


def _code_type(spec: CodeSpec) -> type[np.integer]:
    return np.uint8 if spec.kind == "e4m3" else np.int8


def _encode_tiles(tiles: np.ndarray, scales: np.ndarray, spec: CodeSpec, codes: np.ndarray) -> None:
    """Write the codes of tiles, which are overwritten, into `codes` [rows, in]."""
    tiles /= scales[:, None, :, None]
    np.clip(tiles, spec.lowest, spec.largest, out=tiles)
    if spec.kind == "int":
        np.rint(tiles, out=tiles)
        codes[...] = _untiled(tiles, codes.shape[1])[: len(codes)]
    else:
        codes[...] = fp32_to_e4m3(_untiled(tiles, codes.shape[1])[: len(codes)])


def decode(codes: np.ndarray, scales: np.ndarray, spec: CodeSpec, zeros: np.ndarray | None = None) -> np.ndarray:
    """The weights [out, in] fp32 that codes and scales stand for: the code times the scale, rounded once. `zeros`: the
    code that stands for 0 in each tile, for asymmetric codes of other tools; the shape of `scales`.
    """
    shape = _matrix(codes)
    if spec.kind == "convolutional":
        return convolutional_code.decode(codes, convolutional_code.Scales.from_array(scales))
    assert scales.shape == spec.scale_shape(shape), (scales.shape, shape, spec)
    weight = np.empty(shape, np.float32)
    for span, rows, _ in _spans(shape, spec):
        weight[span] = _decode_rows(codes[span], scales[rows], spec, shape, None if zeros is None else zeros[rows])
    return weight


def _decode_rows(
    codes: np.ndarray, scales: np.ndarray, spec: CodeSpec, shape: tuple[int, int], zeros: np.ndarray | None = None
) -> np.ndarray:
    """`decode` of some rows of a matrix [out, in] of `shape`."""
    values = np.take(_e4m3_values(), codes) if spec.kind == "e4m3" else codes.astype(np.float32)
    tiles = _tiles(values, spec.tile(shape))
    if zeros is not None:
        tiles -= zeros[:, None, :, None]
    tiles *= scales[:, None, :, None]
    return _untiled(tiles, shape[1])[: len(codes)]


def fp32_to_e4m3(values: np.ndarray) -> np.ndarray:
    """The bytes (uint8) of the E4M3 numbers nearest to `values` (fp32, magnitudes at most 448, any shape), ties to
    even, as precision.rounding rounds. Subnormal numbers are multiples of 2^-9.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    # 3 of 23 bits of the mantissa stay: half a unit less one, plus the last bit that stays, carries where rounding is
    # up. The exponent's bias is 127 there and 7 here.
    code = magnitude >> 20
    code &= 1
    code += 0x7FFFF
    code += magnitude
    code >>= 20
    code -= (127 - 7) << 3
    # Adding 2^14 to a number below 2^-6 leaves its multiple of 2^-9 in the last bits, rounded to even.
    small = (magnitude.view(np.float32) + np.float32(2.0**14)).view(np.uint32)
    small &= 0xF
    np.copyto(code, small, where=magnitude < (127 - 6) << 23)
    sign = np.right_shift(bits, 24, out=small)
    sign &= 0x80
    code |= sign
    return code.astype(np.uint8)


@lru_cache(maxsize=1)
def _e4m3_values() -> np.ndarray:
    """[256] fp32: the number of each byte; the two codes 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), mantissa * 2.0**-9)
    value[code & 0x7F == 0x7F] = np.nan
    return np.where(code & 0x80, -value, value).astype(np.float32)


def _matrix(array: np.ndarray) -> tuple[int, int]:
    assert array.ndim == 2, array.shape
    return array.shape[0], array.shape[1]


def _spans(shape: tuple[int, int], spec: CodeSpec) -> Iterator[tuple[slice, slice, int]]:
    """(rows of the matrix, rows of its scales, number of rows) of consecutive parts of about _BLOCK weights."""
    height = 1 if spec.whole else spec.tile(shape)[0]
    step = max(1, _BLOCK // max(1, shape[1] * height)) * height
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        rows = slice(0, 1) if spec.whole else slice(begin // height, -(-end // height))
        yield slice(begin, end), rows, end - begin


def _blocks(weight: np.ndarray, spec: CodeSpec) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows of the matrix, rows of its scales, a copy of those weights by tiles) of consecutive parts."""
    shape = _matrix(weight)
    for span, rows, count in _spans(shape, spec):
        part = np.array(weight[span], np.float32, order="C")
        yield span, rows, _tiles(part, (count, shape[1]) if spec.whole else spec.tile(shape))


def _tiles(part: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """[rows, in] -> [tiles of rows, rows of a tile, tiles of inputs, inputs of a tile], padded with zeros."""
    rows, columns = (min(tile[0], max(1, len(part))), tile[1])
    missing = (-part.shape[0] % rows, -part.shape[1] % columns)
    if any(missing):
        part = np.pad(part, ((0, missing[0]), (0, missing[1])))
    return part.reshape(part.shape[0] // rows, rows, part.shape[1] // columns, columns)


def _untiled(tiles: np.ndarray, num_in: int) -> np.ndarray:
    """The inverse of `_tiles`, without the padding of its columns."""
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)[:, :num_in]


def _largest(tiles: np.ndarray) -> np.ndarray:
    """The largest magnitude of each tile."""
    largest = np.maximum(tiles.max(axis=(1, 3)), -tiles.min(axis=(1, 3)))
    if not np.isfinite(largest).all():
        raise ValueError("a weight is not finite")
    return largest


def _stored(largest: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """The scales that the file keeps for tiles with these largest magnitudes."""
    scales = largest / np.float32((spec.largest - spec.lowest) / 2)
    if spec.scale_type != "fp32":
        scales = round_to(scales, spec.scale_type)
    return np.where(scales > 0, scales, np.float32(1))


def _search(
    tiles: np.ndarray, largest: np.ndarray, scales: np.ndarray, spec: CodeSpec, importance: np.ndarray | None
) -> None:
    """Replace the scales of the tiles by smaller ones where the error is less."""
    least = np.full(largest.shape, np.inf, np.float32)
    for tried in _stored(largest * np.array(_CLIPS, np.float32)[:, None, None], spec):  # all at once: they are small
        step = tried[:, None, :, None]
        rounded = tiles / step
        np.clip(rounded, spec.lowest, spec.largest, out=rounded)
        if spec.kind == "int":
            np.rint(rounded, out=rounded)
        else:
            rounded = np.take(_e4m3_values(), fp32_to_e4m3(rounded))
        rounded *= step
        rounded -= tiles
        np.square(rounded, out=rounded)
        if importance is not None:
            rounded *= importance
        error = rounded.sum(axis=(1, 3))
        better = error < least
        least[better] = error[better]
        scales[better] = tried[better]
