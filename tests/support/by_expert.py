"""Products of rows with the matrices of their experts, row by row in numpy."""

import numpy as np


def products(rows: np.ndarray, weight: np.ndarray, counts: list[int]) -> np.ndarray:
    expert = np.repeat(np.arange(len(counts)), counts)
    return np.stack([row @ weight[e] for row, e in zip(rows, expert, strict=True)])
