"""Gradients by finite differences of plain numpy formulas: what the hand-written backward passes are tested against."""

from collections.abc import Callable

import numpy as np

Formula = Callable[..., np.ndarray]


def numeric_gradient(formula: Formula, arguments: list[np.ndarray], which: int, upstream: np.ndarray) -> np.ndarray:
    """d sum(formula(*arguments) * upstream) / d arguments[which], element by element: fp64, central differences."""
    values = [np.array(argument, dtype=np.float64) for argument in arguments]
    gradient = np.zeros_like(values[which])
    step = 1e-5
    for place in np.ndindex(gradient.shape):
        kept = values[which][place]
        values[which][place] = kept + step
        above = (formula(*values) * upstream).sum()
        values[which][place] = kept - step
        below = (formula(*values) * upstream).sum()
        values[which][place] = kept
        gradient[place] = (above - below) / (2 * step)
    return gradient


def numeric_slope(formula: Formula, argument: np.ndarray, direction: np.ndarray, upstream: np.ndarray) -> float:
    """d sum(formula(argument + t * direction) * upstream) / dt at t = 0: cheap where the argument is large."""
    step = 1e-5
    x, along = np.float64(argument), np.float64(direction)
    return float(((formula(x + step * along) - formula(x - step * along)) * upstream).sum() / (2 * step))
