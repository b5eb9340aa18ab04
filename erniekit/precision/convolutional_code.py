"""Weights in 2 bits as FastDeploy's `wint2` keeps them: a convolutional code (arXiv 2507.07145, there (L, N, S) =
(6, 4, 3)), in numpy. The decoder is published; the encoder here is our own.

A matrix W [out, in] is divided along its inputs: 4 inputs share a byte, 64 inputs (a group) a local scale of 4 bits,
and all inputs of an output channel its super scale. The byte b of 4 weights stands for a word of 15 bits,

    c = floor(b * code_scale + code_zp + 0.5),

of which the four weights are windows of 6 bits, each shifted by 3, so that neighbours share 3 bits:

    z_j = ((c >> (9, 6, 3, 0)[j]) & 63) - 32,        w_j = z_j * local * super,        j = 0..3.

So 256 of the 2^15 words can be reached, which ones a channel's code_scale and code_zp decide, and encoding is a search
for the nearest of 256 points in four dimensions. That is 2 bits a weight, 4/64 for local scales, and 80 bits a channel
for its super scale (bf16), code_scale and code_zp (fp32).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from erniekit.precision.rounding import round_to
from erniekit.utils.arrays import copy_transposed

WORD = 4  # inputs of one byte
GROUP = 64  # inputs of one local scale
PACKED = 128  # inputs of one byte of local scales: two groups
LARGEST_LOCAL = 15
_SHIFTS = (9, 6, 3, 0)
_ZERO = 32

# The pair that reaches the best points for normal weights, found by tools/bench_convolutional_code.py --search. Both
# are multiples of 1/32, so that b * code_scale + code_zp is exact in fp32, whether or not the product is fused.
CODE_SCALE, CODE_ZP = 124.84375, 311.0
STEP = 0.061  # the scale of weights of unit variance that this pair encodes with the least error

_ROUNDS = 3  # of choosing local scales and fitting the super scale
_TRIED = (-1, 0, 1)  # local scales beside the one that is expected
_BLOCK = 1 << 18  # weights a step: bounds the temporaries, and keeps them in the processor's cache
_SCORES = 1024  # vectors a product with the 256 points
_GRID = 32  # cells of the table along each of its four axes


@dataclass(frozen=True)
class Scales:
    """What a file keeps beside the bytes of one matrix. `local_scales`: uint8 [out, in / 64], 0..15, of which 0 makes
    a group of zeros; `super_scales` [out], values of bf16; `code_scale`, `code_zp` [out]; all three fp32.
    """

    local_scales: np.ndarray
    super_scales: np.ndarray
    code_scale: np.ndarray
    code_zp: np.ndarray

    def steps(self) -> np.ndarray:
        """[out, in / 64] fp32: what one unit of a group's windows is worth. Exact: 4 bits times bf16's 8."""
        return self.local_scales.astype(np.float32) * self.super_scales[:, None]

    def to_array(self) -> np.ndarray:
        """[out, in / 64 + 3] fp32: the local scales, then super scale, code_scale and code_zp."""
        channel = (self.super_scales, self.code_scale, self.code_zp)
        return np.column_stack([self.local_scales.astype(np.float32), *channel])

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Scales":
        """The inverse of `to_array`."""
        return cls(array[:, :-3].astype(np.uint8), *(np.ascontiguousarray(column) for column in array.T[-3:]))


def scale_columns(num_in: int) -> int:
    """The columns of `Scales.to_array`."""
    return num_in // GROUP + 3


def reachable_points(code_scale: float, code_zp: float) -> np.ndarray:
    """[256, 4] fp32: the windows of each byte's word, -32..31."""
    one = np.ones(1, np.float32)
    return _windows(np.arange(256, dtype=np.uint8)[None], code_scale * one, code_zp * one)[0].astype(np.float32)


def decode(words: np.ndarray, scales: Scales) -> np.ndarray:
    """uint8 [out, in / 4] -> weight [out, in] fp32, exactly (6 bits of a window times a step of 12). FastDeploy's
    kernels then round it to the model's dtype.
    """
    num_out, num_words = words.shape
    weight = np.empty((num_out, num_words * WORD), np.float32)
    for rows in _row_blocks(num_out, weight.shape[1]):
        windows = _windows(words[rows], scales.code_scale[rows], scales.code_zp[rows]).reshape(len(words[rows]), -1)
        np.multiply(windows, np.repeat(scales.steps()[rows], GROUP, axis=1), out=weight[rows])
    return weight


def _windows(words: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray) -> np.ndarray:
    """uint8 [out, n], fp32 [out], fp32 [out] -> int32 [out, n, 4]."""
    scale, zp = code_scale[:, None].astype(np.float32), code_zp[:, None].astype(np.float32)
    code = np.floor(words.astype(np.float32) * scale + zp + np.float32(0.5)).astype(np.int32)
    return np.stack([(code >> shift & 63) - _ZERO for shift in _SHIFTS], axis=-1)


def encode(weight: np.ndarray, scales: Scales, importance: np.ndarray | None = None) -> np.ndarray:
    """weight [out, in] fp32 -> bytes uint8 [out, in / 4] with the least sum of importance * (w - w')^2 over the inputs
    of each byte, by comparing all 256 points. `importance` [in] (such as the mean square of each input; not negative);
    None: all alike. With a matrix's own scales, encode(decode(words)) gives the same words.
    """
    weights_of_inputs = np.ones(weight.shape[1]) if importance is None else np.asarray(importance, np.float64)
    metrics = [np.diag(part) for part in weights_of_inputs.reshape(-1, WORD)]
    words = np.empty((len(weight), weight.shape[1] // WORD), np.uint8)
    for code, rows in _codes_of(scales):
        points, inverse = reachable_points(*code), inverse_steps(scales.steps()[rows])
        for i, metric in enumerate(metrics):
            vectors = weight[rows, i * WORD : (i + 1) * WORD] * inverse[:, i * WORD // GROUP, None]
            words[rows, i] = nearest_point(vectors, points, metric)
    return words


def nearest_point(vectors: np.ndarray, points: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """The index uint8 [n] of the point p of `points` [256, 4] for which (v - p)^T metric (v - p) is least, for each v
    of `vectors` [n, 4]; `metric` [4, 4] symmetric. Ties go to the first point.
    """
    # Least means largest v^T metric p - p^T metric p / 2, which is one product of matrices for many vectors.
    trace = np.trace(metric)
    to_points = points @ (metric / trace if trace > 0 else np.eye(WORD))
    table = np.vstack([to_points.T, -0.5 * (to_points * points).sum(axis=1)]).astype(np.float32)
    nearest = np.empty(len(vectors), np.uint8)
    for begin in range(0, len(vectors), _SCORES):
        part = vectors[begin : begin + _SCORES]
        scores = part.astype(np.float32, copy=False) @ table[:WORD]
        scores += table[WORD]
        nearest[begin : begin + _SCORES] = scores.argmax(axis=1)
    return nearest


def choose_scales(weight: np.ndarray, importance: np.ndarray | None = None) -> Scales:
    """weight [out, in] fp32 -> scales that make the error of `encode` small, already rounded as a file keeps them. The
    local scales of a channel follow the root mean squares of its groups, the super scale is fitted by least squares to
    the points that were chosen, and both are repeated. `importance` as in `encode`.

    Raises ValueError where a weight is not finite.
    """
    num_out, num_in = weight.shape
    assert num_in % PACKED == 0, num_in
    weights_of_inputs = np.ones(num_in, np.float32) if importance is None else np.asarray(importance, np.float32)
    local, super_ = np.zeros((num_out, num_in // GROUP), np.uint8), np.ones(num_out, np.float32)
    for rows in _row_blocks(num_out, num_in):
        if not np.isfinite(weight[rows]).all():
            raise ValueError("a weight is not finite")
        local[rows], super_[rows] = _fitted(weight[rows], weights_of_inputs.reshape(-1, GROUP))
    return Scales(local, super_, np.full(num_out, CODE_SCALE, np.float32), np.full(num_out, CODE_ZP, np.float32))


def _fitted(weight: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight [n, in] and importance [groups, 64] -> local scales [n, groups] and super scales [n] of these channels."""
    # Powers of two, which are exact, bring channels of any size to 0.5..1, so that no square overflows.
    exponents = np.frexp(np.abs(weight).max(axis=1))[1]
    grouped = np.ldexp(weight, -exponents[:, None]).reshape(len(weight), -1, GROUP)
    importance = importance / max(float(importance.max()), np.finfo(np.float32).tiny)
    total = np.maximum(importance.sum(axis=1), np.finfo(np.float32).tiny)
    steps = STEP * np.sqrt(np.einsum("ngi,gi->ng", grouped**2, importance) / total)
    super_ = round_super_scales(steps.max(axis=1) / LARGEST_LOCAL)
    for _ in range(_ROUNDS):
        local, along, length = choose_local_scales(grouped, super_, importance, steps)
        # sum h (w - super * y)^2 with y = z * local is least at sum h w y / sum h y^2.
        squares = length.sum(axis=1)
        super_ = round_super_scales(np.divide(along.sum(axis=1), squares, out=super_.copy(), where=squares > 0))
    return local, round_super_scales(np.ldexp(super_, exponents))


def round_super_scales(values: np.ndarray) -> np.ndarray:
    """`values` [n], not negative, in bf16; 1 where a channel is all zeros, or too small for bf16."""
    rounded = round_to(values.astype(np.float32), "bf16")
    return np.where(rounded > np.finfo(np.float32).tiny, rounded, np.float32(1))


def choose_local_scales(
    grouped: np.ndarray, super_scales: np.ndarray, importance: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The local scales uint8 [n, groups] with the least error among those nearest to `steps` [n, groups] / super, for
    weights `grouped` [n, groups, 64] and importance [groups, 64]; and, for the points y = z * local that they choose,
    sum h w y and sum h y^2 of each group. Points are looked up in the table.
    """
    expected = np.rint(steps / super_scales[:, None])
    best = np.full(steps.shape, np.inf, np.float32)
    chosen, along, length = np.zeros(steps.shape, np.uint8), np.zeros_like(best), np.zeros_like(best)
    points = reachable_points(CODE_SCALE, CODE_ZP)
    for offset in _TRIED:
        local = np.clip(expected + offset, 0, LARGEST_LOCAL).astype(np.float32)
        step = local * super_scales[:, None]
        y = points[_looked_up(grouped * inverse_steps(step)[..., None])].reshape(grouped.shape)
        weighted = y * importance
        # In units of the channel's super scale, as y is.
        product = np.einsum("ngi,ngi->ng", grouped, weighted) * local
        square = np.einsum("ngi,ngi->ng", y, weighted) * local**2
        error = square * super_scales[:, None] ** 2 - 2 * product * super_scales[:, None]
        better = error < best
        for array, value in ((best, error), (chosen, local), (along, product), (length, square)):
            np.copyto(array, value, where=better, casting="unsafe")
    return chosen, along, length


def _looked_up(values: np.ndarray) -> np.ndarray:
    """values [..., 64] in steps -> the bytes [..., 16] of the table's cells."""
    cells = values * np.float32(0.5)
    cells += _GRID // 2
    np.clip(cells, 0, _GRID - 1, out=cells)  # conversion truncates: cell k holds 2k - 32 <= value < 2k - 30
    first, second, third, fourth = (cells.astype(np.int32)[..., j::WORD] for j in range(WORD))
    return _table()[((first * _GRID + second) * _GRID + third) * _GRID + fourth]


@cache
def _table() -> np.ndarray:
    """uint8 [32^4], 1 MB: the point nearest to the middle of each cell, all of them 2 steps wide in each dimension. It
    is 5 to 10 times as fast as the comparison with all points, and errs only near the borders between points.
    """
    middle = 2 * np.arange(_GRID, dtype=np.float32) - 31
    cells = np.stack(np.meshgrid(middle, middle, middle, middle, indexing="ij"), axis=-1).reshape(-1, WORD)
    return nearest_point(cells, reachable_points(CODE_SCALE, CODE_ZP), np.eye(WORD))


def inverse_steps(steps: np.ndarray) -> np.ndarray:
    """1 / steps, 0 where a step is 0."""
    return np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)


def _codes_of(scales: Scales) -> Iterator[tuple[tuple[float, float], np.ndarray]]:
    """Each (code_scale, code_zp) that occurs, and the channels that have it."""
    pairs = np.stack([scales.code_scale, scales.code_zp], axis=1)
    values, which = np.unique(pairs, axis=0, return_inverse=True)
    for i, (code_scale, code_zp) in enumerate(values):
        yield (code_scale, code_zp), np.flatnonzero(which.reshape(-1) == i)


def _row_blocks(num_out: int, num_in: int) -> Iterator[slice]:
    rows = max(1, _BLOCK // num_in)
    return (slice(begin, begin + rows) for begin in range(0, num_out, rows))


def to_file(words: np.ndarray, scales: Scales) -> dict[str, np.ndarray]:
    """The tensors of one matrix in a -Paddle file, by their suffix: quant_weight uint8 [in / 4, out], weight_scale
    uint8 [in / 128, out] (the even group in the high half of a byte, the odd one in the low half), super_scales [out]
    (fp32 here, bf16 in the file), code_scale and code_zp fp32 [out].
    """
    halves = scales.local_scales[:, 0::2] << 4 | scales.local_scales[:, 1::2]
    return {
        "quant_weight": _transposed(words),
        "weight_scale": _transposed(halves),
        "super_scales": scales.super_scales,
        "code_scale": scales.code_scale,
        "code_zp": scales.code_zp,
    }


def from_file(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, Scales]:
    """The inverse of `to_file`."""
    halves = _transposed(tensors["weight_scale"])
    local = np.stack([halves >> 4, halves & 15], axis=-1).reshape(len(halves), -1)
    scales = Scales(local, tensors["super_scales"], tensors["code_scale"], tensors["code_zp"])
    return _transposed(tensors["quant_weight"]), scales


def _transposed(matrix: np.ndarray) -> np.ndarray:
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    copy_transposed(matrix, out)
    return out
