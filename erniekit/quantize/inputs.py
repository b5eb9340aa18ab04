"""What the algorithms need to know about the inputs of a matrix, summed up while the inputs pass by."""

import copy

import numpy as np

# Inputs that are kept as they are, to measure errors of outputs: enough for the searches (AWQ's reference
# implementation uses as many), and few enough for a product with every candidate.
NUM_SAMPLED = 512


class InputStatistics:
    """Statistics of the inputs [n, in] of a matrix: their number, for each input the mean and the largest magnitude, H
    = X^T X if `with_hessian`, and a sample of up to NUM_SAMPLED evenly spaced ones.

    `expected`: how many inputs there will be, by which the sample is spaced. Sums are fp64.
    """

    def __init__(self, num_in: int, expected: int, with_hessian: bool) -> None:
        self.count = 0
        self._expected = expected
        self._sum_abs = np.zeros(num_in)
        self._sum_square = np.zeros(num_in)
        self.max_abs = np.zeros(num_in, np.float32)
        self.hessian = np.zeros((num_in, num_in)) if with_hessian else None
        self.sample = np.empty((0, num_in), np.float32)

    def add(self, rows: np.ndarray) -> None:
        """Add inputs [n, in] fp32."""
        if not len(rows):
            return
        magnitudes = np.abs(rows)
        self._sum_abs += magnitudes.sum(axis=0, dtype=np.float64)
        np.maximum(self.max_abs, magnitudes.max(axis=0), out=self.max_abs)
        self._sum_square += np.einsum("ni,ni->i", rows, rows, dtype=np.float64)
        if self.hessian is not None:
            self.hessian += rows.T @ rows
        wanted = evenly_spaced(self._expected, NUM_SAMPLED)
        chosen = wanted[(wanted >= self.count) & (wanted < self.count + len(rows))] - self.count
        self.sample = np.concatenate([self.sample, rows[chosen]])
        self.count += len(rows)

    def pop_hessian(self) -> np.ndarray:
        """H, which this object no longer keeps: it is large, and factoring needs the memory."""
        hessian, self.hessian = self.hessian, None
        assert hessian is not None
        return hessian

    @property
    def mean_abs(self) -> np.ndarray:
        """Mean magnitude of each input [in] fp64."""
        return self._sum_abs / max(self.count, 1)

    @property
    def mean_square(self) -> np.ndarray:
        """Mean square of each input [in] fp64: the diagonal of H over the number of inputs."""
        return self._sum_square / max(self.count, 1)

    def divided_by(self, scale: np.ndarray) -> "InputStatistics":
        """The statistics of the inputs after a division by `scale` [in]."""
        assert self.hessian is None, "the algorithms that divide inputs do not use H"
        divided = copy.copy(self)
        divided._sum_abs = self._sum_abs / scale
        divided._sum_square = self._sum_square / scale**2
        divided.max_abs = (self.max_abs / scale).astype(np.float32)
        divided.sample = (self.sample / scale).astype(np.float32)
        return divided

    def blended_with(self, others: "InputStatistics") -> "InputStatistics":
        """The mean of these statistics and of `others`, each divided by its number of inputs, with H of equal trace:
        for an expert with few inputs of its own, and those of its layer.
        """
        if not self.count:
            return copy.copy(others)
        blended = copy.copy(others)
        blended.count = self.count + others.count
        half = blended.count / 2
        blended._sum_abs = half * (self.mean_abs + others.mean_abs)
        blended._sum_square = half * (self.mean_square + others.mean_square)
        blended.max_abs = np.maximum(self.max_abs, others.max_abs)
        blended.sample = np.concatenate([self.sample, others.sample])
        if self.hessian is not None and others.hessian is not None:
            trace, other = np.trace(self.hessian), np.trace(others.hessian)
            blended.hessian = others.hessian * (trace / other if trace and other else 1.0) + self.hessian
        return blended


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers 0 .. count - 1, evenly spaced, ascending."""
    if count <= most:
        return np.arange(count)
    return ((np.arange(most) + 0.5) * count / most).astype(np.int64)
