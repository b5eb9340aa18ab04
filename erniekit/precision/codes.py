"""Weights in 8 or 4 bits as files keep them: scales, codes and back, in numpy. Every quantised file is made by this
rounding.

A weight is [out, in], as files of -PT have it: w = scale * code. The codes are whole numbers, or FP8 (E4M3) bytes.
Weights that share a scale are a tile: a channel, a group of consecutive inputs of a channel, a block, or the whole
matrix. A scale is rounded to the type in which the file keeps it before a weight is divided by it; otherwise some codes
would not be the nearest ones. A tile of zeros has scale 1, and so has one whose scale would be rounded to 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from erniekit.precision import convolutional_code
from erniekit.precision.rounding import round_to
from erniekit.utils.arrays import transposed

# Weights a step: with the temporaries of a step they stay in the second and third cache, and a step of numpy takes
# 10 us or more, so that threads seldom wait for the interpreter.
_BLOCK = 1 << 18
# Elements of numpy's buffer. It copies what is broadcast, a scale of each row, into the buffer, row after row, if the
# buffer holds more than a row; that is three times the time of a product.
_BUFFER = 512
# Adding it rounds a number below 2^22 to a whole one, ties to even, whose two's complement is in the sum's last bits.
_ROUNDING = np.float32(1.5 * 2**23)
# Sizes of groups whose search has the inputs of a group as rows; of how many parts of a group the largest weights are
# compared with a candidate's last code; and their factor, so that rounding cannot exclude a candidate.
_LANES = (32, 64, 128)
_PARTS = 8
_SLACK = np.float32(1 - 1e-5)
_NEVER_ALONE = 0.8  # candidates from this share on are worth trying for nearly every group
# Sums of squares down to this have lost at most their last digits to squares that fp32 cannot hold.
_SMALL = 1e-25
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


@contextmanager
def _small_buffer() -> Iterator[None]:
    """Operations with the buffer of _BUFFER, in this thread."""
    before = np.setbufsize(_BUFFER)
    try:
        yield
    finally:
        np.setbufsize(before)


@_small_buffer()
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


@_small_buffer()
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


@_small_buffer()
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
        _encode_tiles(tiles, scales[rows], spec, codes[span], float((largest / scales[rows]).max(initial=0.0)))
    return codes, scales


@_small_buffer()
def squared_error(weight: np.ndarray, codes: np.ndarray, scales: np.ndarray, spec: CodeSpec) -> tuple[float, float]:
    """The sum of (w' - w)^2, and that of w^2, for w = `weight` [out, in] fp32 and w' the values of codes and scales."""
    squared = total = 0.0
    if spec.kind == "convolutional":
        lost = decode(codes, scales, spec)
        lost -= weight
        return _squares(lost), _squares(weight)
    shape = _matrix(codes)
    for span, rows, _ in _spans(shape, spec):
        part, lost = weight[span], _decode_rows(codes[span], scales[rows], spec, shape)
        lost -= part
        squared += _squares(lost)
        total += _squares(part)
    return squared, total


def _squares(values: np.ndarray) -> float:
    """The sum of the squares of fp32 values; in fp64 where it is beyond the range of fp32, or so small that squares may
    have become 0.
    """
    total = float(np.vdot(values, values))
    return total if _SMALL < total < np.inf else float(np.square(values, dtype=np.float64).sum())


def _code_type(spec: CodeSpec) -> type[np.integer]:
    return np.uint8 if spec.kind == "e4m3" else np.int8


def _encode_tiles(
    tiles: np.ndarray, scales: np.ndarray, spec: CodeSpec, codes: np.ndarray, reach: float = np.inf
) -> None:
    """Write the codes of tiles into `codes` [rows, in]. `reach`: no weight is more scales away from 0."""
    steps = np.divide(tiles, _by_tile(scales, tiles))
    _clip(steps.reshape(len(tiles) * tiles.shape[1], -1), spec, reach)
    if spec.kind == "int":
        steps += _ROUNDING
        codes[...] = _untiled(steps.view(np.int32), codes.shape[1])[: len(codes)]  # the last 8 bits
    else:
        codes[...] = fp32_to_e4m3(_untiled(steps, codes.shape[1])[: len(codes)])


@_small_buffer()
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
    values = e4m3_to_fp32(codes) if spec.kind == "e4m3" else codes.astype(np.float32)
    tiles = _tiles(values, spec.tile(shape))
    if zeros is not None:
        tiles -= zeros[:, None, :, None]
    tiles *= _by_tile(scales, tiles)
    return _untiled(tiles, shape[1])[: len(codes)]


def fp32_to_e4m3(values: np.ndarray) -> np.ndarray:
    """The bytes (uint8) of the E4M3 numbers nearest to `values` (fp32, magnitudes at most 448, any shape), ties to
    even, as precision.rounding rounds. Subnormal numbers are multiples of 2^-9.
    """
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    # 3 of 23 bits of the mantissa stay: half a unit less one, plus the last bit that stays, carries where rounding is
    # up. The exponent's bias is 127 there and 7 here. The sign stays in front.
    work = bits >> 20
    work &= 1
    work += 0x7FFFF
    work += bits
    work >>= 20
    short = work.astype(np.int16)
    magnitude = short & 0x7FF
    magnitude -= (127 - 7) << 3
    short >>= 4
    short &= 0x80
    short |= magnitude
    codes = short.astype(np.uint8)
    small = np.flatnonzero(magnitude < 8)  # multiples of 2^-9; few, unless most weights are zeros
    if len(small):
        numbers = np.take(values.reshape(-1), small)
        multiples = np.rint(np.abs(numbers) * np.float32(2.0**9)).astype(np.uint8)
        codes.reshape(-1)[small] = multiples | np.signbit(numbers).view(np.uint8) << 7
    return codes


def e4m3_to_fp32(codes: np.ndarray) -> np.ndarray:
    """The numbers (fp32) of E4M3 bytes (uint8, any shape), exactly; NaN of 0x7F and 0xFF."""
    codes = np.ascontiguousarray(codes)
    bits = codes.view(np.int8).astype(np.int32)
    bits <<= 20
    bits &= -0x78100000  # 0x87F00000: the sign, which fills the front, and the other bits
    bits += (127 - 7) << 23
    # Subnormal numbers, and NaN: few, unless most weights are zeros.
    rest = codes & 0x7F
    rest += 1
    others = np.flatnonzero((rest < 9) | (rest == 0x80))
    if len(others):
        bits.reshape(-1)[others] = np.take(_e4m3_values(), codes.reshape(-1)[others]).view(np.int32)
    return bits.view(np.float32)


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
    """(rows of the matrix, rows of its scales, those weights by tiles in fp32) of consecutive parts. The weights may be
    those of the matrix, and are not to be changed.
    """
    shape = _matrix(weight)
    for span, rows, count in _spans(shape, spec):
        part = np.ascontiguousarray(weight[span], np.float32)
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
    magnitudes = np.bitwise_and(tiles.view(np.uint32), 0x7FFFFFFF)  # whole numbers in the order of the magnitudes
    if tiles.shape[1] > 1:
        magnitudes = magnitudes.max(axis=1, keepdims=True)
    largest: np.ndarray = magnitudes[:, 0].max(axis=2).view(np.float32)
    if not np.isfinite(largest).all():
        raise ValueError("a weight is not finite")
    return largest


def _by_tile(scales: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Scales [tiles of rows, tiles of inputs] in a shape to multiply `tiles` by. Where tiles have several rows, that is
    a row of as many numbers as inputs: the operation is then one on whole rows.
    """
    if tiles.shape[1] == 1:
        return scales[:, None, :, None]
    return np.repeat(scales, tiles.shape[3], axis=1).reshape(len(scales), 1, *tiles.shape[2:])


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
    candidates = _stored(largest * np.array(_CLIPS, np.float32)[:, None, None], spec)  # all at once: they are small
    if importance is None and spec.kind == "int" and tiles.shape[1] == 1 and tiles.shape[3] in _LANES:
        scales[...] = _best_of_groups(tiles, candidates.reshape(len(_CLIPS), -1), spec).reshape(scales.shape)
        return
    least = np.full(largest.shape, np.inf, np.float32)
    for tried in candidates:
        step = tried[:, None, :, None]
        rounded = tiles / step
        _clip(rounded.reshape(len(rounded) * rounded.shape[1], -1), spec)
        if spec.kind == "int":
            np.rint(rounded, out=rounded)
        else:
            rounded = e4m3_to_fp32(fp32_to_e4m3(rounded))
        rounded *= step
        rounded -= tiles
        np.square(rounded, out=rounded)
        if importance is not None:
            rounded *= importance
        error = rounded.sum(axis=(1, 3))
        better = error < least
        least[better] = error[better]
        scales[better] = tried[better]


def _clip(values: np.ndarray, spec: CodeSpec, reach: float = np.inf) -> None:
    """Limit contiguous rows to the first and the last code, if there are magnitudes up to `reach`, which rounding would
    not bring to these codes. numpy compares with a single number, as np.clip does, one by one, and waits at every one
    that is clipped; with a row, many at a time.
    """
    margin = 0.49 if spec.kind == "int" else 15.0  # half of the last step of E4M3 is 16
    if reach > spec.largest + margin:
        np.minimum(values, np.full(values.shape[1], spec.largest, np.float32), out=values)
    if reach > margin - spec.lowest:
        np.maximum(values, np.full(values.shape[1], spec.lowest, np.float32), out=values)


def _best_of_groups(tiles: np.ndarray, candidates: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """The best of `candidates` [number, groups] for each group of a channel, [groups]: what `_search` finds in a loop.

    The inputs of a group are the first axis here, so that all operations are on long rows; the sum has the order of
    numpy's own over one row. A candidate is not tried for groups of which a few large weights alone lose more by it, as
    they are beyond its last code, than all weights lose by the best one so far. Where that leaves less than half of the
    groups, the others are dropped.
    """
    size = tiles.shape[3]
    weight = transposed(tiles.reshape(-1, size))  # [inputs of a group, groups]
    parts = weight.reshape(_PARTS, size // _PARTS, -1)
    above, below = parts.max(axis=1), np.negative(parts.min(axis=1))  # two large weights of each part
    above *= _SLACK
    below *= _SLACK
    best, least = candidates[0].copy(), np.full(weight.shape[1], np.inf, np.float32)
    alive = np.arange(weight.shape[1])  # the groups that are left
    work = np.empty_like(weight)
    for share, tried in zip(_CLIPS, candidates, strict=True):
        step = tried[alive]
        if share < _NEVER_ALONE:
            lost = _beyond(above, step * np.float32(spec.largest)) + _beyond(below, step * np.float32(-spec.lowest))
            worth = lost <= least[alive]
            count = np.count_nonzero(worth)
            if count == 0:
                continue
            if count < len(alive) / 2:
                alive, step, weight = alive[worth], step[worth], np.compress(worth, weight, axis=1)
                above, below, work = above[:, worth], below[:, worth], np.empty_like(weight)
        np.divide(weight, step, out=work)
        _clip(work, spec)
        np.rint(work, out=work)
        work *= step
        work -= weight
        np.square(work, out=work)
        error = _sum_of_rows(work)
        better = error < least[alive]
        least[alive[better]] = error[better]
        best[alive[better]] = step[better]
    return best


def _beyond(magnitudes: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """The sum over the first axis of the squares of what exceeds `limit`."""
    over = magnitudes - limit
    np.maximum(over, np.zeros_like(limit), out=over)
    np.square(over, out=over)
    total: np.ndarray = over.sum(axis=0)
    return total


def _sum_of_rows(values: np.ndarray) -> np.ndarray:
    """The sum over the first axis, of up to 128 elements, in the order in which numpy sums a contiguous row of as many:
    8 sums of every eighth one, and those by pairs.
    """
    lanes = np.add.reduce(values.reshape(-1, 8, values.shape[1]), axis=0)
    pairs = lanes[0::2] + lanes[1::2]
    pairs = pairs[0::2] + pairs[1::2]
    total: np.ndarray = pairs[0] + pairs[1]
    return total
