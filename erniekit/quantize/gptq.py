"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights are rounded input by input, and what rounding an input changes
in the outputs is compensated by the inputs that are still to be rounded.

For inputs X [n, in] of a matrix W [out, in] the error of its outputs is tr(E H E^T), with E the error of W and
H = X^T X. GPTQ updates the remaining weights through the Cholesky factor of the inverse of H. The same result is had
without an inverse (Chee et al. 2023, arXiv 2307.13304, section 3.1 and theorem 6): with H = U D U^T, U unit upper
triangular, column k of W is rounded at w_k + sum over j < k of e_j U_jk, e_j the error of column j that is rounded
already. The error is then the sum over k of D_k times the squared rounding errors, which is the greedy optimum.

Scales are chosen before a weight is rounded ("static groups"): with `act_order` no reader needs to know the order.
"""

from dataclasses import dataclass

import numpy as np

from erniekit.precision.codes import CodeSpec, encode
from erniekit.precision.rounding import round_to

# Inputs that are rounded between two products with all errors so far. Within a block every input costs a product of its
# own, which reads the block's errors from the cache.
_BLOCK = 64
# How often the damping is multiplied by 10 before a matrix is not compensated at all.
_ATTEMPTS = 4


@dataclass(frozen=True)
class Factor:
    """H = U D U^T of the inputs of a matrix, in the order in which they are rounded. It serves all matrices that have
    the same inputs.

    `order` int [in]: the numbers of the inputs; `unit` [in, in]: U, of which only what is above the diagonal is read;
    `dead` int [m]: the numbers of inputs that are always 0, whose weights become 0; `damping`: what was used in the
    end, a share of the mean of the diagonal of H.
    """

    order: np.ndarray
    unit: np.ndarray
    dead: np.ndarray
    damping: float


def factorise(hessian: np.ndarray, damping: float = 0.01, act_order: bool = True) -> Factor | None:
    """The factor of `hessian` [in, in] (fp64, symmetric; X^T X up to a constant).

    `damping`: this share of the mean of the diagonal is added to the diagonal, ten times as much each time where the
    sum is not positive definite in this precision. `act_order`: inputs with larger mean squares are rounded first;
    otherwise in their own order. None where no damping suffices, or no input differs from 0.
    """
    diagonal = np.diagonal(hessian).copy()
    if not np.isfinite(diagonal).all():
        raise ValueError("the calibration inputs are not finite")
    dead = np.flatnonzero(diagonal <= 0)
    if len(dead) == len(diagonal):
        return None
    diagonal[dead] = 1.0
    mean = float(diagonal.mean())
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    # U is upper triangular and the Cholesky factor lower: both orders are reversed before and after it.
    reversed_order = order[::-1]
    permuted = hessian[np.ix_(reversed_order, reversed_order)]
    del hessian  # freed here if the caller has given it away
    share = damping
    for _ in range(_ATTEMPTS):
        np.fill_diagonal(permuted, diagonal[reversed_order] + share * mean)
        try:
            lower = np.linalg.cholesky(permuted)
        except np.linalg.LinAlgError:
            share = 10 * share if share else 0.01
            continue
        lower /= np.diagonal(lower).copy()  # each column by its diagonal: unit triangular
        return Factor(order, lower[::-1, ::-1], dead, share)
    return None


def gptq(weight: np.ndarray, factor: Factor, scales: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """The codes of `weight` [out, in] (fp32, or fp64 for arithmetic in fp64) with `scales` of codes.choose_scales: as
    codes.encode gives them, [out, in].
    """
    num_out, num_in = weight.shape
    dtype = np.result_type(weight.dtype, np.float32)
    order, unit = factor.order, np.ascontiguousarray(factor.unit, dtype)
    # [in, out] from here on: one input is one contiguous row.
    values = np.ascontiguousarray(weight.T[order], dtype)
    steps = _steps(scales, spec, (num_out, num_in))
    rounded = np.empty_like(values)
    errors = np.empty_like(values)
    is_dead = np.zeros(num_in, bool)
    is_dead[factor.dead] = True
    for begin in range(0, num_in, _BLOCK):
        end = min(begin + _BLOCK, num_in)
        block = values[begin:end].copy()
        if begin:
            block += unit[:begin, begin:end].T @ errors[:begin]
        for place in range(begin, end):
            target = block[place - begin]
            if place > begin:
                target += unit[begin:place, place] @ errors[begin:place]
            number = order[place]
            if is_dead[number]:
                rounded[place], errors[place] = 0, 0
                continue
            rounded[place] = nearest(target, steps[number], spec)
            np.subtract(values[place], rounded[place], out=errors[place])
    back = np.empty_like(order)
    back[order] = np.arange(num_in)
    return encode(np.ascontiguousarray(rounded[back].T), scales, spec)


def nearest(values: np.ndarray, scale: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """What `values` become when they are rounded to codes with `scale` (which broadcasts), as codes.encode rounds."""
    scaled = values / scale
    np.clip(scaled, spec.lowest, spec.largest, out=scaled)
    if spec.kind == "int":
        np.rint(scaled, out=scaled)
    else:
        scaled = round_to(scaled, "e4m3").astype(values.dtype, copy=False)
    scaled *= scale
    return scaled


class _Steps:
    """The scales [out] of one input's weights, by the number of the input."""

    def __init__(self, scales: np.ndarray, tile_in: int) -> None:
        self._by_group = np.ascontiguousarray(scales.T)  # [groups, out]
        self._tile_in = tile_in

    def __getitem__(self, number: int) -> np.ndarray:
        return self._by_group[number // self._tile_in]


def _steps(scales: np.ndarray, spec: CodeSpec, shape: tuple[int, int]) -> _Steps:
    tile_out, tile_in = spec.tile(shape)
    return _Steps(np.repeat(scales, tile_out, axis=0)[: shape[0]], tile_in)
