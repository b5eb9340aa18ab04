"""Chooses the next tokens of many rows at once, where the rows draw from their whole distributions in the same way.

The tokens are those that sampling.choose gives each row alone, to the bit: a row's numbers do not depend on the others.
Plain numpy; a loop over rows would take longer than the pass of a small model.

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 18  # scores that are looked at together, so that they stay in the processor's cache


class DrawSettings(NamedTuple):
    """How a row draws: `temperature` (0: the highest score is chosen), the tokens that are never chosen, and the
    temperature of the log-probabilities that are returned (None: none are).
    """

    temperature: float
    never: tuple[int, ...] = ()
    score_temperature: float | None = None


def draw_rows(
    scores_BV: np.ndarray, settings: DrawSettings, generators: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens int64 [B] of rows with these scores (logits) fp32 [B, V], and, if `settings` asks for them, their
    log-probabilities float64 [B] in the distribution of all tokens. The scores are left as they are.

    Where a row is drawn, the temperature of its log-probabilities is that of the draw (see `DrawSettings`).
    """
    assert settings.score_temperature is None or settings.temperature in (0, settings.score_temperature), settings
    size = max(1, _BLOCK // scores_BV.shape[1])
    parts = [
        _block(scores_BV[start : start + size], settings, generators[start : start + size])
        for start in range(0, len(scores_BV), size)
    ]
    logprobs = None if settings.score_temperature is None else np.concatenate([part[1] for part in parts])
    return np.concatenate([part[0] for part in parts]), logprobs


def _block(
    scores_BV: np.ndarray, settings: DrawSettings, generators: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray | float]:
    never, rows = list(settings.never), np.arange(len(scores_BV))
    temperature = np.float32(settings.temperature or settings.score_temperature or 1.0)
    scaled_BV = scores_BV / temperature
    of_never = scaled_BV[:, never]
    scaled_BV[:, never] = -np.inf
    highest_B = scaled_BV.max(axis=-1)
    if settings.temperature == 0:
        tokens = scaled_BV.argmax(axis=-1)
        if settings.score_temperature is None:
            return tokens, 0.0
    weights_BV = np.subtract(scaled_BV, highest_B[:, None], out=scaled_BV)
    np.exp(weights_BV, out=weights_BV)
    if settings.temperature == 0:
        total_B = weights_BV.sum(axis=-1, dtype=np.float64)
    else:
        cumulative_BV = np.cumsum(weights_BV, axis=-1, dtype=np.float64)
        total_B = cumulative_BV[:, -1]
        uniform_B = np.array([generator.random() for generator in generators])
        tokens = (cumulative_BV <= (uniform_B * total_B)[:, None]).sum(axis=-1)
        _repair(tokens, weights_BV)
    if settings.score_temperature is None:
        return tokens, 0.0
    total_B = total_B + np.exp(of_never.astype(np.float64) - highest_B[:, None]).sum(axis=-1)
    chosen_B = scores_BV[rows, tokens] / temperature - highest_B.astype(np.float64)
    return tokens, chosen_B - np.log(total_B)


def _repair(tokens_B: np.ndarray, weights_BV: np.ndarray) -> None:
    """Where a product of draw and sum was rounded up to the sum, the token is the last one that has a weight."""
    for row in np.flatnonzero(tokens_B == weights_BV.shape[1]):
        tokens_B[row] = np.flatnonzero(weights_BV[row])[-1]
    for row in np.flatnonzero(weights_BV[np.arange(len(tokens_B)), tokens_B] == 0):
        tokens_B[row] = np.flatnonzero(weights_BV[row])[-1]
