"""Scaled frequencies against the formulas of their papers in float64."""

import math

import numpy as np
import paddle
import pytest

from erniekit.nn.frequencies import RopeScaling, inverse_frequencies, scaled_frequencies
from erniekit.nn.rotary import Rotary

DIM, THETA, LENGTH = 32, 10000.0, 64
EXPONENTS = np.arange(0, DIM, 2) / DIM
PLAIN = THETA**-EXPONENTS


def frequencies(scaling: RopeScaling | None, positions: np.ndarray | None = None) -> np.ndarray:
    return scaled_frequencies(DIM, THETA, scaling, np.arange(4) if positions is None else positions)


def test_linear_divides_positions():
    np.testing.assert_allclose(frequencies(RopeScaling("linear", 4.0, LENGTH)), PLAIN / 4, rtol=1e-6)
    np.testing.assert_array_equal(frequencies(None), inverse_frequencies(DIM, THETA))


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(truncate: bool):
    """Peng et al., equations 17 to 23: a linear ramp over the index of a frequency, between those that turn beta_slow
    and beta_fast times in the original length.
    """
    found = frequencies(RopeScaling("yarn", 8.0, LENGTH, beta_fast=4.0, beta_slow=1.0, truncate=truncate))
    turns = LENGTH * PLAIN / (2 * math.pi)
    low, high = (DIM / 2 * math.log(LENGTH / (2 * math.pi * beta), THETA) for beta in (4.0, 1.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    share = np.clip((np.arange(DIM // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, PLAIN * (1 - share) + PLAIN / 8 * share, rtol=1e-5)
    slack = 2.0 if truncate else 1.0
    np.testing.assert_allclose(found[turns > 4 * slack], PLAIN[turns > 4 * slack], rtol=1e-5)
    np.testing.assert_allclose(found[turns < 1 / slack], PLAIN[turns < 1 / slack] / 8, rtol=1e-5)


def test_yarn_with_a_small_base_is_that_of_transformers():
    """There the ramp may fall: the index of the fast border is 16, that of the slow one is cut to the last, 9."""
    found = scaled_frequencies(10, 2.0, RopeScaling("yarn", 4.0, 2048), np.arange(4))
    np.testing.assert_allclose(found, inverse_frequencies(10, 2.0) / 4, rtol=1e-6)


def test_dynamic_raises_the_base_with_the_length_of_each_text():
    """Texts of 10 and 100 tokens in one row, and of 80; only those beyond the original length change, as they do by
    themselves.
    """
    scaling = RopeScaling("dynamic", 2.0, LENGTH)
    rows = [np.arange(10), np.arange(100), np.arange(80)]
    found = frequencies(scaling, np.concatenate(rows))
    np.testing.assert_array_equal(found[:10], np.tile(inverse_frequencies(DIM, THETA), (10, 1)))
    for text, begin in ((rows[1], 10), (rows[2], 110)):
        base = THETA * (2.0 * len(text) / LENGTH - 1.0) ** (DIM / (DIM - 2))
        np.testing.assert_allclose(found[begin], base**-EXPONENTS, rtol=1e-6)
        np.testing.assert_array_equal(found[begin : begin + len(text)], frequencies(scaling, text))
    one_each = scaled_frequencies(DIM, THETA, scaling, np.array([90, 91, 92]), row=1)  # a step of three conversations
    for found, position in zip(one_each, (90, 91, 92), strict=True):
        np.testing.assert_array_equal(found, frequencies(scaling, np.array([position]))[0])


def test_the_factor_of_attention_multiplies_what_is_rotated_and_nothing_else():
    plain, scaled = (
        Rotary(DIM, THETA, scaling=RopeScaling("linear", 1.0, LENGTH, attention_factor=factor)) for factor in (1.0, 1.5)
    )
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(5, 3, DIM)).astype(np.float32))
    one, other = (rotary.at(np.arange(5), 2, 1).apply(x).numpy() for rotary in (plain, scaled))
    np.testing.assert_allclose(other[:, :2], 1.5 * one[:, :2], atol=1e-6)
    np.testing.assert_array_equal(other[:, 2:], x.numpy()[:, 2:])
