"""Scales rewards by what they have been like in their domain (mathematics, code, ...), to make domains comparable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SMALLEST_STD = 1e-4


@dataclass
class _Moments:
    """Number, mean and sum of squared differences from the mean of all values so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Add values (Chan, Golub and LeVeque 1979, equation 2.1: moments of two sets together)."""
        count = len(values)
        total = self.count + count
        difference = float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation, with the divisor count - 1."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0


class DomainStatistics:
    """Running means and standard deviations of rewards by domain. ERNIE 4.5's report normalises rewards by domain and
    leaves the formula open; this one is ours.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Moments] = {}

    def scaled(self, domains: Sequence[str], rewards_N: np.ndarray) -> np.ndarray:
        """(reward - mean) / (std + 1e-4) [N], by the values of each domain so far and these. NaN stays."""
        names, result = np.array(domains), rewards_N.copy()
        for name in dict.fromkeys(domains):
            here = (names == name) & ~np.isnan(rewards_N)
            if here.any():
                moments = self._of.setdefault(name, _Moments())
                moments.add(rewards_N[here])
                result[here] = (rewards_N[here] - moments.mean) / (moments.std + _SMALLEST_STD)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain JSON values."""
        return {name: [moments.count, moments.mean, moments.squares] for name, moments in self._of.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved statistics."""
        self._of = {name: _Moments(int(values[0]), *map(float, values[1:])) for name, values in state.items()}
