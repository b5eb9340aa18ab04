"""Rotary embedding where rounding shows, 5,000 tokens in and at the end of a context of 131,072, against transformers'
numbers (tools/make_rotary_fixture.py)."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.build import load_model
from erniekit.nn.frequencies import inverse_frequencies
from erniekit.nn.rotary import Rotary

FIXTURES = Path(__file__).resolve().parent / "fixtures"
ROTARY = np.load(FIXTURES / "rotary.npz")
ULP = np.finfo(np.float32).eps / 2  # of numbers just below 1


@pytest.mark.parametrize("key", [key for key in ROTARY.files if key.startswith("frequencies/")])
def test_frequencies_are_equal_bit_for_bit(key: str):
    _, head_dim, theta = key.split("/")
    np.testing.assert_array_equal(inverse_frequencies(int(head_dim), float(theta)), ROTARY[key])


def test_angles_are_those_of_transformers_to_one_rounding_at_far_positions():
    table = Rotary(128, 500000.0).at(ROTARY["positions"], 1, 1).table.numpy()
    np.testing.assert_allclose(table[:, 0].real, ROTARY["cos"], rtol=0, atol=ULP)
    np.testing.assert_allclose(table[:, 0].imag, ROTARY["sin"], rtol=0, atol=ULP)
    assert (table[:, 1] == 1).all()


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "dense_tied")


def tokens(start: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(start).integers(3, vocab_size, 5000), np.arange(start, start + 5000)


# With frequencies computed in float64 and rounded they are 1.2e-4 and 6.6e-4 away.
@pytest.mark.parametrize(("start", "tolerance"), [(0, 5e-5), (126072, 5e-5)])
def test_logits_after_five_thousand_tokens(model, start: int, tolerance: float):
    ids, positions = tokens(start, model.config.vocab_size)
    places, expected = ROTARY[f"logits/{start}/places"], ROTARY[f"logits/{start}/values"]
    with paddle.no_grad():
        found = model(ids[None], position_ids=positions[None]).numpy()[0, places]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_the_cache_of_generation_rotates_alike(model):
    ids, _ = tokens(0, model.config.vocab_size)
    cache = model.new_cache(1)
    for begin, end in ((0, 2501), (2501, 4999), (4999, 5000)):
        logits = model.extend(ids[None, begin:end], np.array([end - begin]), cache).numpy()[0]
    np.testing.assert_allclose(logits, ROTARY["logits/0/values"][-1], rtol=0, atol=5e-5)
