"""Each step from scores to a token against its formula, and against transformers' processors where installed."""

import importlib.util

import numpy as np
import pytest

from erniekit.generation.choosing import likeliest
from erniekit.generation.drawing import DrawSettings, draw_rows
from erniekit.generation.sampling import (
    Sampling,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_frequency,
    penalise_repetition,
)
from erniekit.utils.errors import UserError

SCORES = np.array([2.0, -1.0, 0.5, 3.0, -4.0, 0.0], dtype=np.float32)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return powers / powers.sum()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def kept(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(scores)).tolist()


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores_once_per_token():
    found = penalise_repetition(SCORES, [0, 1, 0, 5, 0], 2.0)
    assert found.tolist() == [1.0, -2.0, 0.5, 3.0, -4.0, 0.0]
    assert penalise_repetition(SCORES, [], 2.0).tolist() == SCORES.tolist()


def test_frequency_counts_each_time_and_presence_once():
    assert penalise_frequency(SCORES, [3, 0, 3], 0.5, 0.25).tolist() == [1.25, -1.0, 0.5, 1.75, -4.0, 0.0]


def test_top_k_keeps_ties():
    assert kept(keep_top_k(SCORES, 2)) == [0, 3]
    assert kept(keep_top_k(np.array([1.0, 2.0, 1.0, 0.0]), 2)) == [0, 1, 2]
    assert kept(keep_top_k(SCORES, 0)) == kept(keep_top_k(SCORES, 99)) == list(range(6))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    scores = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    assert kept(keep_top_p(scores, 0.4)) == [1]
    assert kept(keep_top_p(scores, 0.5001)) == [1, 3]
    assert kept(keep_top_p(scores, 0.8)) == [1, 2, 3]
    assert kept(keep_top_p(scores, 1.0)) == [0, 1, 2, 3]
    assert kept(keep_top_p(scores, 1e-20)) == [1], "at least one token is left"
    assert kept(keep_top_p(scores, 0.0)) == [1] and len(kept(keep_top_p(np.zeros(7), 0.0))) == 1


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    scores = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    assert kept(keep_min_p(scores, 0.4)) == [1, 3]
    assert kept(keep_min_p(scores, 0.29)) == [1, 2, 3]
    assert kept(keep_min_p(scores, 1.0)) == [1] and kept(keep_min_p(scores, 0.0)) == [0, 1, 2, 3]
    likely = Sampling(temperature=1.0, min_p=0.4, seed=0)
    assert {choose(scores, [0], [], likely, rng(seed)) for seed in range(40)} == {1, 3}


def test_a_bias_is_added_to_the_score_of_its_token_alone():
    assert choose(SCORES, [0], [], Sampling(logit_bias=((2, 2.6), (3, -1.0))), rng()) == 2
    assert choose(SCORES, [0], [], Sampling(logit_bias=((2, 2.4),)), rng()) == 3


def test_draws_follow_the_probabilities():
    generator = rng()
    counts = np.bincount([draw(SCORES, generator) for _ in range(20000)], minlength=6)
    np.testing.assert_allclose(counts / 20000, softmax(SCORES), atol=0.012)


def test_a_filtered_token_is_never_drawn():
    generator = rng()
    scores = keep_top_k(np.zeros(50) + np.arange(50) % 2, 25)
    assert all(draw(scores, generator) % 2 for _ in range(2000))


def test_choose_is_greedy_without_temperature_and_obeys_penalties_and_bans():
    assert choose(SCORES, [], [], Sampling(), rng()) == 3
    assert choose(SCORES, [], [], Sampling(), rng(), banned=[3]) == 0
    assert choose(SCORES, [3], [], Sampling(repetition_penalty=4.0), rng()) == 0
    assert choose(SCORES, [3], [], Sampling(presence_penalty=2.0), rng()) == 3, "the prompt does not count"
    assert choose(SCORES, [], [3], Sampling(presence_penalty=2.0), rng()) == 0
    assert SCORES[3] == 3.0, "the caller's scores are not changed"


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-46, 1e-300])
def test_next_to_no_temperature_is_the_likeliest_token(temperature: float):
    """The divided scores would leave fp32, and one such request would end an engine."""
    scores = np.array([3.0, 5.5, -2.0, 5.4], np.float32)
    for more in ({}, {"top_p": 0.5, "top_k": 2}, {"min_p": 0.1, "repetition_penalty": 1e-300}):
        sampling = Sampling(temperature=temperature, seed=1, **more)
        assert choose(scores, [1], [], sampling, np.random.default_rng(0)) == 1
    used = Sampling(temperature=temperature).temperature
    tokens, logprobs = draw_rows(scores[None], DrawSettings(used, (), used), [np.random.default_rng(0)])
    assert tokens.tolist() == [1] and logprobs is not None and logprobs.tolist() == [0.0]


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
def test_a_huge_penalty_leaves_scores_finite(penalty: float):
    scores = penalise_repetition(np.array([3.0, 0.0, -2.0], np.float32), [0, 1, 2], penalty)
    assert scores.dtype == np.float32 and np.isfinite(scores).all()
    assert (scores[0] > 3) == (penalty < 1) and (scores[2] > -2) == (penalty < 1) and scores[1] == 0


def test_choose_applies_temperature_before_top_p():
    sharp, flat = Sampling(temperature=0.2, top_p=0.9), Sampling(temperature=5.0, top_p=0.9)
    tokens = {s: {choose(SCORES, [], [], s, rng(seed)) for seed in range(200)} for s in (sharp, flat)}
    assert tokens[sharp] == {3}
    assert tokens[flat] == {0, 1, 2, 3, 5}


def test_a_seed_decides():
    sampling = Sampling(temperature=1.0)
    first, again, other = ([choose(SCORES, [], [], sampling, g) for _ in range(40)] for g in (rng(5), rng(5), rng(6)))
    assert first == again != other


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", -0.1), ("top_p", 1.2), ("top_k", -1), ("repetition_penalty", 0.0)],
)
def test_a_value_out_of_range_is_named(name: str, value: float):
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_transformers(seed: int):
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    generator = rng(seed)
    prompt, generated = generator.integers(0, 400, 30).tolist(), generator.integers(0, 400, 10).tolist()
    scores = (generator.standard_normal(400) * 2).astype(np.float32)
    ids, expected = torch.tensor([prompt + generated]), torch.tensor(scores[None])
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(50),
        hf.TopPLogitsWarper(0.8),
        hf.MinPLogitsWarper(0.05),
    ):
        expected = processor(ids, expected)
    ours = penalise_repetition(scores, prompt + generated, 1.3) / np.float32(0.7)
    ours = keep_min_p(keep_top_p(keep_top_k(ours, 50), 0.8), 0.05)
    assert len(kept(ours)) < 50
    np.testing.assert_allclose(ours, expected[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.95, 0.9999])
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, 30.0])
def test_top_p_equals_sorting_everything(p: float, scale: float):
    for seed, size in enumerate((1, 2, 7, 500, 5000)):
        scores = (rng(seed).standard_normal(size) * scale).round(2).astype(np.float32)  # with ties
        probabilities = softmax(scores)
        order = np.argsort(scores, kind="stable")
        nucleus = order[np.cumsum(probabilities[order]) > 1 - p]
        expected = len(nucleus) or 1
        found = kept(keep_top_p(scores, p))
        # Weights are fp32, so at a border within rounding there may be one token more or less.
        assert abs(len(found) - expected) <= (0 if size < 500 else 1)
        assert min(scores[found]) >= np.sort(scores)[-len(found)]


def test_the_likeliest_tokens_are_those_of_a_whole_sort():
    draws = rng(3)
    for size in (1, 2, 7, 50):
        for count in (0, 1, 5, 20, 60):
            logprobs = np.round(draws.normal(size=size), 1)  # many are equal
            assert likeliest(logprobs, count).tolist() == np.argsort(-logprobs, kind="stable")[:count].tolist()
