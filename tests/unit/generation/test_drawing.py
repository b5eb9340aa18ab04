"""Rows that are drawn together get the tokens that each gets alone, and the log-probabilities of the formula."""

import numpy as np
import pytest

from erniekit.generation.drawing import DrawSettings, draw_rows
from erniekit.generation.sampling import Sampling, choose

NEVER = (0, 7, 40)


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([5, row]) for row in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("size", "scale"), [(50, 3.0), (576, 60.0), (9000, 1.0)])
def test_a_row_is_drawn_as_alone(temperature: float, size: int, scale: float):
    scores = (np.random.default_rng(1).standard_normal((70, size)) * scale).astype(np.float32)
    scores[:, 7] += 200.0  # the likeliest token is one that is never chosen
    before = scores.copy()
    settings, sampling = DrawSettings(temperature, NEVER, temperature or 2.0), Sampling(temperature)
    tokens, logprobs = draw_rows(scores, settings, generators(70))
    alone = [choose(row, [], [], sampling, rng, NEVER) for row, rng in zip(before.copy(), generators(70), strict=True)]
    assert tokens.tolist() == alone and (scores == before).all()
    scaled = before.astype(np.float64) / (temperature or 2.0)
    rounding = np.abs(scaled).max() * np.finfo(np.float32).eps  # of a score divided by a temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    expected = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    assert logprobs is not None
    np.testing.assert_allclose(logprobs, expected[np.arange(70), tokens], rtol=1e-6, atol=2 * rounding)
    part, of_part = draw_rows(scores[3:5], settings, generators(70)[3:5])
    assert part.tolist() == tokens[3:5].tolist() and of_part is not None and (of_part == logprobs[3:5]).all()


def test_the_last_token_with_a_weight_is_drawn_where_the_draw_rounds_up():
    class Largest:
        def random(self) -> float:
            return 1.0

    scores = np.array([[1.0, 2.0, 0.5, -500.0, 9.0]], np.float32)
    tokens, logprobs = draw_rows(scores, DrawSettings(1.0, (4,)), [Largest()])  # type: ignore[list-item]
    assert tokens.tolist() == [2] and logprobs is None
