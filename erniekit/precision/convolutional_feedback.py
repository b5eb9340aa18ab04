"""The encoder of `wint2` with calibration: what the rounding of four inputs costs is compensated by the inputs behind
them (BlockLDLQ, arXiv 2402.04396, section 4.1; with one input at a time it is GPTQ, arXiv 2210.17323).

For inputs x with the second moments H = E[x x^T], a channel with the error e = w - w' changes its output by e H e^T in
the mean square. Let H = (I + U) D (I + U)^T with blocks of four inputs: U above the diagonal, D on it. Then

    e H e^T = sum over blocks k of (t_k - w'_k) D_k (t_k - w'_k)^T,        t_k = w_k + sum_{j < k} e_j U_jk,

so each block, from the first to the last, is the nearest point to t_k in the metric D_k.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from erniekit.precision.convolutional_code import (
    GROUP,
    STEP,
    WORD,
    Scales,
    choose_local_scales,
    choose_scales,
    decode,
    inverse_steps,
    nearest_point,
    reachable_points,
    round_super_scales,
)

_ROUNDS = 2  # of encoding with a super scale and fitting the super scale
_ATTEMPTS = 4  # how often the damping is multiplied by 10


@dataclass(frozen=True)
class BlockFactor:
    """H = (I + U) D (I + U)^T of the inputs of a matrix. `moments` [in, in] fp32: H with damping, divided by the mean
    of its diagonal; `upper` [in, in] fp32: U; `metrics` [in / 4, 4, 4] fp64: the blocks of D; `damping`: what was used.
    """

    moments: np.ndarray
    upper: np.ndarray
    metrics: np.ndarray
    damping: float


def factorise_blocks(moments: np.ndarray, damping: float = 0.01) -> BlockFactor | None:
    """The factor of the second moments [in, in] of inputs, up to a constant. `damping`: this share of the mean of the
    diagonal is added to it, ten times as much each time where the sum is not positive definite. None where no damping
    suffices, or no input differs from 0. Raises ValueError where a moment is not finite.
    """
    if not np.isfinite(moments).all():
        raise ValueError("the calibration inputs are not finite")
    mean = float(np.trace(moments)) / len(moments)
    if mean <= 0:
        return None
    for attempt in range(_ATTEMPTS):
        share = damping * 10**attempt if damping else (0.0, 0.01, 0.1, 1.0)[attempt]
        damped = moments / mean
        damped[np.diag_indices_from(damped)] += share
        try:
            upper, metrics = _block_factors(damped)
        except np.linalg.LinAlgError:
            continue
        return BlockFactor(damped.astype(np.float32), upper, metrics, share)
    return None


def _block_factors(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """moments [in, in] fp64 -> U [in, in] fp32 and D [in / 4, 4, 4] fp64; LinAlgError if not positive definite."""
    # The Cholesky factor of the reversed matrix, reversed: H = R R^T with R upper triangular.
    upper = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    blocks = range(0, len(upper), WORD)
    diagonal = np.stack([upper[i : i + WORD, i : i + WORD] for i in blocks])
    factors = np.zeros(upper.shape, np.float32)
    for i, inverse in zip(blocks, np.linalg.inv(diagonal), strict=True):
        factors[:i, i : i + WORD] = upper[:i, i : i + WORD] @ inverse
    return factors, diagonal @ diagonal.transpose(0, 2, 1)


def encode_with_feedback(weight: np.ndarray, factor: BlockFactor) -> tuple[np.ndarray, Scales]:
    """weight [out, in] fp32 -> bytes uint8 [out, in / 4] and scales, which make e H e^T of each channel small. Raises
    ValueError where a weight is not finite.
    """
    scales = choose_scales(weight, np.diag(factor.moments))
    best: _Result | None = None
    for _ in range(_ROUNDS):
        result = _encoded(weight, scales, factor)
        best = result if best is None else _better(best, result)
        scales = _with_fitted_super_scales(weight, result, factor.moments)
    assert best is not None
    return best.words, best.scales


class _Result(NamedTuple):
    """Bytes [out, in / 4], their scales, and the losses e H e^T [out] fp64."""

    words: np.ndarray
    scales: Scales
    losses: np.ndarray


def _encoded(weight: np.ndarray, scales: Scales, factor: BlockFactor) -> _Result:
    """The bytes with the super scales of `scales`, and local scales chosen again at the start of each group for the
    targets there, which differ more from one another than the weights.
    """
    upper, metrics = factor.upper, factor.metrics
    targets, errors = weight.astype(np.float32), np.empty(weight.shape, np.float32)
    words = np.empty((len(weight), weight.shape[1] // WORD), np.uint8)
    local, losses = np.empty_like(scales.local_scales), np.zeros(len(weight))
    points = reachable_points(float(scales.code_scale[0]), float(scales.code_zp[0]))
    importance = np.einsum("kii->ki", metrics).astype(np.float32).reshape(-1, GROUP)
    for group in range(local.shape[1]):
        begin, end = group * GROUP, (group + 1) * GROUP
        local[:, group] = _local_scales(targets[:, begin:end], scales.super_scales, importance[group])
        step = local[:, group] * scales.super_scales
        inverse = inverse_steps(step)[:, None]
        for i in range(begin, end, WORD):
            inputs, metric = slice(i, i + WORD), metrics[i // WORD]
            words[:, i // WORD] = nearest_point(targets[:, inputs] * inverse, points, metric)
            chosen = points[words[:, i // WORD]] * step[:, None]
            rest = targets[:, inputs] - chosen
            losses += np.einsum("ni,ij,nj->n", rest, metric, rest)
            errors[:, inputs] = weight[:, inputs] - chosen
            targets[:, i + WORD : end] += errors[:, inputs] @ upper[inputs, i + WORD : end]
        targets[:, end:] += errors[:, begin:end] @ upper[begin:end, end:]
    return _Result(words, Scales(local, scales.super_scales, scales.code_scale, scales.code_zp), losses)


def _local_scales(targets: np.ndarray, super_scales: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """targets [out, 64] -> uint8 [out]."""
    mean = np.einsum("ni,i->n", targets**2, importance) / importance.sum()
    steps = STEP * np.sqrt(mean)[:, None]
    return choose_local_scales(targets[:, None], super_scales, importance[None], steps)[0][:, 0]


def _with_fitted_super_scales(weight: np.ndarray, result: _Result, moments: np.ndarray) -> Scales:
    """The scales of `result` with the super scale s of each channel that makes (w - s y) H (w - s y)^T least, for the
    points y that were chosen.
    """
    scales = result.scales
    ones = np.ones_like(scales.super_scales)
    y = decode(result.words, Scales(scales.local_scales, ones, scales.code_scale, scales.code_zp))
    weighted = y @ moments
    along, length = np.einsum("ni,ni->n", weight, weighted), np.einsum("ni,ni->n", y, weighted)
    fitted = np.divide(along, length, out=scales.super_scales.copy(), where=(length > 0) & (along > 0))
    return Scales(scales.local_scales, round_super_scales(fitted), scales.code_scale, scales.code_zp)


def _better(first: _Result, second: _Result) -> _Result:
    """The result with the smaller loss for each channel."""
    take = second.losses < first.losses
    scales = Scales(
        np.where(take[:, None], second.scales.local_scales, first.scales.local_scales),
        np.where(take, second.scales.super_scales, first.scales.super_scales),
        first.scales.code_scale,
        first.scales.code_zp,
    )
    words = np.where(take[:, None], second.words, first.words)
    return _Result(words, scales, np.where(take, second.losses, first.losses))
