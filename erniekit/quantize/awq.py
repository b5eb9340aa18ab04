"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs with large activations are scaled up in the weights before these are
rounded, and the scale is folded into the operation in front (quantize/folds.py).

For every ratio r of a grid, s = mean|x|^r / mean|w|^(1-r), where |w| is relative to the largest of its scale's tile,
and the error of the outputs of all matrices that share the inputs decides. s = 1 is among the candidates, so that the
result is never worse than rounding to nearest on the inputs that were searched with.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from erniekit.precision.codes import CodeSpec, choose_scales, decode, encode

NUM_RATIOS = 10
_SMALLEST = 1e-4


class Weighed(NamedTuple):
    """A matrix [out, in] with inputs [n, in] on which its error is measured, and how much that error counts: the
    number of calibration tokens that these inputs stand for, over n. `spec` None: the matrix is not rounded.
    `clip_search`: its scales are searched (codes.choose_scales), as they will be in the end.
    """

    weight: np.ndarray
    inputs: np.ndarray
    tokens_per_input: float
    spec: CodeSpec | None
    clip_search: bool = False


class Search(NamedTuple):
    """`scale` [in], its `ratio` (None: s = 1), and the squared errors of the outputs with it and with s = 1."""

    scale: np.ndarray
    ratio: float | None
    error: float
    plain_error: float


class Sharing(NamedTuple):
    """Inputs that must have one scale: `mean` gives the mean of a value of each input over those [in] -> [scales],
    `expand` the scale of each input [scales] -> [in].
    """

    mean: Callable[[np.ndarray], np.ndarray]
    expand: Callable[[np.ndarray], np.ndarray]


def search(
    matrices: Callable[[], Iterable[Weighed]],
    mean_abs: np.ndarray,
    sharing: Sharing | None = None,
    num_ratios: int = NUM_RATIOS,
) -> Search:
    """The scale of the inputs that all `matrices` share with the least error of their outputs.

    `matrices` is called twice, and gives one matrix at a time. `mean_abs` [in]: the mean magnitude of each input. With
    `sharing` the scale has one value for the inputs that must have the same.
    """
    mean, expand = sharing or Sharing(lambda values: values, lambda values: values)
    relative, magnitude = mean(_mean_relative_weight(matrices(), len(mean_abs))), mean(mean_abs)
    candidates: list[tuple[float | None, np.ndarray]] = [(None, np.ones(len(magnitude)))]
    for step in range(num_ratios):
        candidates.append((step / num_ratios, _candidate(magnitude, relative, step / num_ratios)))
    errors = np.zeros(len(candidates))
    for matrix in matrices():
        if matrix.spec is None or not len(matrix.inputs):
            continue
        for number, (_, scale) in enumerate(candidates):
            errors[number] += matrix.tokens_per_input * _error(matrix, expand(scale))
    best = int(np.argmin(errors))  # the first of equal ones: s = 1
    ratio, scale = candidates[best]
    return Search(scale, ratio, float(errors[best]), float(errors[0]))


def _candidate(mean_abs: np.ndarray, relative: np.ndarray, ratio: float) -> np.ndarray:
    """s for one ratio, normalised so that its largest and smallest value are reciprocal."""
    scale = np.maximum(mean_abs**ratio / (relative ** (1 - ratio) + _SMALLEST), _SMALLEST)
    return scale / np.sqrt(scale.max() * scale.min())


def _mean_relative_weight(matrices: Iterable[Weighed], num_in: int) -> np.ndarray:
    """For each input the mean over all its weights of |w| over the largest magnitude of its tile [in] fp64."""
    total, count = np.zeros(num_in), 0
    for weight, _, _, spec, _ in matrices:
        if spec is None:
            continue
        tile = spec.tile((len(weight), num_in))[1]
        group = tile if num_in % tile == 0 else num_in
        tiles = np.abs(weight).reshape(len(weight), -1, group)
        largest = tiles.max(axis=-1, keepdims=True)
        total += (tiles / np.where(largest > 0, largest, 1)).sum(axis=0, dtype=np.float64).reshape(num_in)
        count += len(weight)
    return total / max(count, 1)


def _error(matrix: Weighed, scale: np.ndarray) -> float:
    """Squared error of the outputs when the weights times `scale` are rounded and divided again."""
    weight, inputs, _, spec, clip_search = matrix
    assert spec is not None
    scale = scale.astype(np.float32)
    scaled, inputs = weight * scale, inputs / scale
    steps = choose_scales(scaled, spec, clip_search, np.square(inputs).mean(axis=0) if clip_search else None)
    rounded = decode(encode(scaled, steps, spec), steps, spec)
    rounded -= scaled
    difference = inputs @ rounded.T
    return float(np.einsum("no,no->", difference, difference, dtype=np.float64))
