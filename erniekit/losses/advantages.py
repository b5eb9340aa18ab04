"""Advantages of completions from their rewards, in numpy: groups of completions of one prompt are compared.

Legend: N completions, G of each prompt in a row; K reward functions.
"""

from typing import Literal

import numpy as np

Scaling = Literal["group", "batch", "none", "gdpo", "rloo"]
_SMALLEST_STD = 1e-4


def combined(rewards_NK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Weighted sums [N] of the rewards; NaN marks a function that did not score a completion and is left out, and a
    completion that none scored.
    """
    scored = ~np.isnan(rewards_NK)
    sums = np.where(scored, rewards_NK, 0.0) @ weights_K
    return np.where(scored.any(axis=1), sums, np.nan)


def advantages_of(
    rewards_NK: np.ndarray, weights_K: np.ndarray, group_size: int, scaling: Scaling = "group"
) -> np.ndarray:
    """Advantages float64 [N] of completions, of which each `group_size` in a row answer one prompt.

    scaling: "group": (R - mean of the group) / (its standard deviation + 1e-4) (GRPO, arXiv 2402.03300; the deviation
    has the divisor G - 1). "batch": the deviation of all completions instead (arXiv 2508.08221). "none": R - mean
    (Dr. GRPO, arXiv 2503.20783). "rloo": R - the mean of the group's other completions (arXiv 2402.14740). "gdpo":
    each function's rewards are scaled as by "group", summed, and the sums scaled as by "batch" (arXiv 2601.05242).

    A completion that no function could score takes part in no mean and has 0. Raises ValueError for a group of fewer
    than two, or for rewards that are infinite.
    """
    rewards_NK, weights_K = np.asarray(rewards_NK, np.float64), np.asarray(weights_K, np.float64)
    if group_size < 2 or len(rewards_NK) % group_size:
        raise ValueError(
            f"{len(rewards_NK)} completions in groups of {group_size}: a group needs two or more, and all are whole"
        )
    if np.isinf(rewards_NK).any():
        raise ValueError("a reward is infinite")
    rewards = combined(rewards_NK, weights_K)
    if scaling == "gdpo":
        scaled = [_scaled(column, group_size, "group") for column in rewards_NK.T]
        values = combined(np.stack(scaled, axis=1), weights_K)
        result = (values - _mean(values[None])[0]) / (_std(values[None])[0] + _SMALLEST_STD)
    else:
        result = _scaled(rewards, group_size, scaling)
    return np.where(np.isnan(rewards), 0.0, np.nan_to_num(result))


def _scaled(rewards: np.ndarray, group_size: int, scaling: Scaling) -> np.ndarray:
    groups = rewards.reshape(-1, group_size)
    centred = _centred(groups)
    if scaling == "group":
        return (centred / (_std(groups) + _SMALLEST_STD)).reshape(-1)
    if scaling == "batch":
        return (centred / (_std(rewards[None]) + _SMALLEST_STD)).reshape(-1)
    if scaling == "rloo":
        count = (~np.isnan(groups)).sum(axis=1, keepdims=True)
        return (centred * count / np.maximum(count - 1, 1)).reshape(-1)
    if scaling == "none":
        return centred.reshape(-1)
    raise ValueError(f"scaling: expected group, batch, none, gdpo or rloo, got {scaling!r}")


def _mean(groups: np.ndarray) -> np.ndarray:
    """[groups, 1], of what is not NaN; 0 where nothing is."""
    count = (~np.isnan(groups)).sum(axis=1, keepdims=True)
    return np.nansum(groups, axis=1, keepdims=True) / np.maximum(count, 1)


def _std(groups: np.ndarray) -> np.ndarray:
    """[groups, 1], with the divisor n - 1, of what is not NaN; 0 where fewer than two values are, and exactly 0 where
    all are equal.
    """
    count = (~np.isnan(groups)).sum(axis=1, keepdims=True)
    squares = np.nansum(_centred(groups) ** 2, axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def _centred(groups: np.ndarray) -> np.ndarray:
    """The differences from the mean of each group; exactly 0 where all its values are equal, of which the rounded mean
    may be another number.
    """
    missing = np.isnan(groups)
    lowest = np.where(missing, np.inf, groups).min(axis=1, keepdims=True)
    highest = np.where(missing, -np.inf, groups).max(axis=1, keepdims=True)
    return np.where(lowest < highest, groups - _mean(groups), groups * 0)


def overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """0 up to max_length - cache tokens, then falling linearly to -1 at max_length, and -1 beyond (DAPO's soft overlong
    punishment, arXiv 2503.14476, eq. 13).
    """
    return float(np.clip((max_length - cache - length) / cache, -1.0, 0.0))
