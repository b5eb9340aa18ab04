"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations are moved into the weights, so that both
can be rounded to 8 bits. The scale is folded into the operation in front (quantize/folds.py).
"""

from collections.abc import Iterable

import numpy as np

_SMALLEST = 1e-5


def smoothing_scale(max_abs: np.ndarray, weights: Iterable[np.ndarray], strength: float = 0.5) -> np.ndarray:
    """s = max|x|^strength / max|w|^(1 - strength) for each input [in] (eq. 4): x / s and w s then have equal ranges at
    0.5; more moves more into the weights.

    `max_abs` [in]: the largest magnitude of each input; `weights`: the matrices [out, in] that share the inputs. Inputs
    without activations or weights keep scale 1.
    """
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    used = (max_abs > 0) & (largest > 0)
    scale = np.maximum(max_abs, _SMALLEST) ** strength / np.maximum(largest, _SMALLEST) ** (1 - strength)
    return np.where(used, np.maximum(scale, _SMALLEST), 1.0)
