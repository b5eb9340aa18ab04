"""The encoder of `wint2` with calibration: what the rounding of four inputs costs is compensated by the inputs behind
them (BlockLDLQ, arXiv 2402.04396, section 4.1; with one input at a time it is GPTQ, arXiv 2210.17323).

For inputs x with the second moments H = E[x x^T], a channel with the error e = w - w' changes its output by e H e^T in
the mean square. Let H = (I + U) D (I + U)^T with blocks of four inputs: U above the diagonal, D on it. Then

    e H e^T = sum over blocks k of (t_k - w'_k) D_k (t_k - w'_k)^T,        t_k = w_k + sum_{j < k} e_j U_jk,

so each block, from the first to the last, is the nearest point to t_k in the metric D_k.
"""

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

DAMPING = 0.01  # of the mean of the diagonal, added to it: GPTQ's
_ROUNDS = 2  # of encoding with a super scale and fitting the super scale


def encode_with_feedback(
    weight: np.ndarray, moments: np.ndarray, damping: float = DAMPING
) -> tuple[np.ndarray, Scales]:
    """weight [out, in] fp32 and second moments [in, in] of its inputs (a common factor does not matter) -> bytes uint8
    [out, in / 4] and scales, which make e H e^T of each channel small.

    Raises ValueError where a weight or a moment is not finite, and numpy.linalg.LinAlgError where the moments with
    `damping` are not positive definite.
    """
    if not np.isfinite(moments).all():
        raise ValueError("a second moment of the inputs is not finite")
    damped = np.asarray(moments, np.float64).copy()
    mean = float(np.trace(damped)) / len(damped)
    damped /= mean if mean > 0 else 1
    damped[np.diag_indices_from(damped)] += damping if mean > 0 else 1
    upper, metrics = block_factors(damped)
    scales = choose_scales(weight, np.diag(damped))
    damped, best = damped.astype(np.float32), None
    for _ in range(_ROUNDS):
        words, scales, losses = _encoded(weight, scales, upper, metrics)
        best = (words, scales, losses) if best is None else _better(best, (words, scales, losses))
        scales = _with_fitted_super_scales(weight, words, scales, damped)
    assert best is not None
    return best[0], best[1]


def block_factors(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """moments [in, in] fp64, positive definite -> U [in, in] fp32 (zeros on and below its diagonal blocks) and D
    [in / 4, 4, 4] fp64.
    """
    # The Cholesky factor of the reversed matrix, reversed: H = R R^T with R upper triangular.
    upper = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    blocks = range(0, len(upper), WORD)
    diagonal = np.stack([upper[i : i + WORD, i : i + WORD] for i in blocks])
    factors = np.zeros(upper.shape, np.float32)
    for i, inverse in zip(blocks, np.linalg.inv(diagonal), strict=True):
        factors[:i, i : i + WORD] = upper[:i, i : i + WORD] @ inverse
    return factors, diagonal @ diagonal.transpose(0, 2, 1)


def _encoded(
    weight: np.ndarray, scales: Scales, upper: np.ndarray, metrics: np.ndarray
) -> tuple[np.ndarray, Scales, np.ndarray]:
    """Bytes [out, in / 4], scales with the local scales chosen again from the targets at the start of each group, and
    the losses [out] in fp64, all with the super scales of `scales`.
    """
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
    return words, Scales(local, scales.super_scales, scales.code_scale, scales.code_zp), losses


def _local_scales(targets: np.ndarray, super_scales: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """targets [out, 64] -> uint8 [out]."""
    mean = np.einsum("ni,i->n", targets**2, importance) / importance.sum()
    steps = STEP * np.sqrt(mean)[:, None]
    return choose_local_scales(targets[:, None], super_scales, importance[None], steps)[0][:, 0]


def _with_fitted_super_scales(weight: np.ndarray, words: np.ndarray, scales: Scales, moments: np.ndarray) -> Scales:
    """`scales` with the super scale s of each channel that makes (w - s y) H (w - s y)^T least, for the points y that
    were chosen.
    """
    ones = np.ones_like(scales.super_scales)
    y = decode(words, Scales(scales.local_scales, ones, scales.code_scale, scales.code_zp))
    weighted = y @ moments
    along, length = np.einsum("ni,ni->n", weight, weighted), np.einsum("ni,ni->n", y, weighted)
    fitted = np.divide(along, length, out=scales.super_scales.copy(), where=(length > 0) & (along > 0))
    return Scales(scales.local_scales, round_super_scales(fitted), scales.code_scale, scales.code_zp)


def _better(
    first: tuple[np.ndarray, Scales, np.ndarray], second: tuple[np.ndarray, Scales, np.ndarray]
) -> tuple[np.ndarray, Scales, np.ndarray]:
    """Of each channel the result with the smaller loss."""
    take = second[2] < first[2]
    scales = Scales(
        np.where(take[:, None], second[1].local_scales, first[1].local_scales),
        np.where(take, second[1].super_scales, first[1].super_scales),
        first[1].code_scale,
        first[1].code_zp,
    )
    return np.where(take[:, None], second[0], first[0]), scales, np.where(take, second[2], first[2])
