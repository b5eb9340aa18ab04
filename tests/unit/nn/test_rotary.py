"""Rotary embedding of interleaved pairs against the rotation matrix."""

import numpy as np
import paddle
import pytest

from erniekit.nn import rotary
from erniekit.nn.rotary import Rotary

THETA = 10000.0


def rotated(x_THd: np.ndarray, positions: np.ndarray, plain: int) -> np.ndarray:
    """Pair j of a head turns by position * theta^(-2j/d); the last `plain` heads stay."""
    tokens, heads, dim = x_THd.shape
    out = np.array(x_THd, dtype=np.float64)
    for t in range(tokens):
        for j in range(dim // 2):
            angle = positions[t] * THETA ** (-2 * j / dim)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            pair = slice(2 * j, 2 * j + 2)
            out[t, : heads - plain, pair] = x_THd[t, : heads - plain, pair] @ turn.T
    return out


def test_pairs_turn_by_their_angle_and_values_do_not():
    positions = np.array([0, 1, 2, 0, 1, 37])
    x = np.random.default_rng(0).normal(size=(6, 5, 8)).astype(np.float32)
    y = Rotary(8, THETA).at(positions, 3, 2).apply(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(y, rotated(x, positions, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y[:, 3:], x[:, 3:])
    np.testing.assert_array_equal(y[[0, 3]], x[[0, 3]])


def test_short_documents_have_the_bits_of_long_ones():
    """Sines and cosines of a position are then computed once for all documents."""
    positions = np.concatenate([np.arange(5), np.arange(3), np.arange(4)])
    long = Rotary(8, THETA).table(np.arange(100))
    np.testing.assert_array_equal(Rotary(8, THETA).table(positions), long[positions])
    assert Rotary(8, THETA).table(np.zeros(0, np.int64)).shape == (0, 4)


def test_the_inverse_undoes_and_is_the_adjoint():
    random = np.random.default_rng(1)
    rotation = Rotary(16, THETA).at(np.arange(7) * 11, 2, 1)
    x, y = (random.normal(size=(7, 3, 16)).astype(np.float32) for _ in "xy")
    there = rotation.apply(paddle.to_tensor(x))
    np.testing.assert_allclose(rotation.apply(there, inverse=True).numpy(), x, atol=2e-6)
    back = rotation.apply(paddle.to_tensor(y), inverse=True).numpy()
    np.testing.assert_allclose((there.numpy() * y).sum(), (x * back).sum(), rtol=1e-4)


def test_scores_depend_on_distance_alone():
    random = np.random.default_rng(2)
    q, k = (random.normal(size=(1, 1, 32)).astype(np.float32) for _ in "qk")

    def score(i: int, j: int) -> float:
        turned = [
            Rotary(32, THETA).at(np.array([p]), 1).apply(paddle.to_tensor(x)).numpy() for x, p in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(score(1005, 1000), score(5, 0), rtol=1e-3)
    assert abs(score(5, 0) - score(6, 0)) > 1e-3


def test_equal_positions_on_all_axes_are_the_positions_of_text():
    positions = np.array([0, 1, 2, 7, 130_000])
    three = np.repeat(positions[:, None], 3, axis=1)
    for time_frequencies in (20, 64):
        found = Rotary(128, 500000.0, time_frequencies).at(three, 3, 1).table
        np.testing.assert_array_equal(found.numpy(), Rotary(128, 500000.0).at(positions, 3, 1).table.numpy())


def test_the_last_frequencies_turn_with_time_and_the_others_with_height_and_width_in_turn():
    rotary = Rotary(16, THETA, time_frequencies=3)
    # Each line moves along one axis alone: time, height, width.
    table = rotary.at(9 * np.eye(3, dtype=np.int64), 1).table.numpy()[:, 0]
    line = Rotary(16, THETA).at(np.array([9]), 1).table.numpy()[0, 0]
    axes = ["h", "w", "h", "w", "h", "t", "t", "t"]
    for axis, found in zip("thw", table, strict=True):
        np.testing.assert_array_equal(found, np.where(np.array(axes) == axis, line, 1))


def test_a_model_of_text_refuses_positions_on_three_axes():
    with pytest.raises(ValueError, match="text alone"):
        Rotary(16, THETA).at(np.zeros((4, 3), np.int64), 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_table_for_all_heads_rotates_as_one_with_a_row_for_each(
    dtype: str, inverse: bool, monkeypatch: pytest.MonkeyPatch
):
    positions = np.arange(600)[::-1].copy()  # more than two blocks
    x = paddle.to_tensor(np.random.default_rng(3).normal(size=(600, 5, 8))).astype(dtype)
    expanded = Rotary(8, THETA).at(positions, 3, 2)
    expected = expanded.apply(x, inverse).numpy()
    monkeypatch.setattr(rotary, "MAX_EXPANDED_BYTES", 0)
    shared = Rotary(8, THETA).at(positions, 3, 2)
    assert expanded.table.shape == [600, 5, 4] and shared.table.shape == [600, 1, 4]
    np.testing.assert_array_equal(shared.apply(x, inverse).numpy(), expected)
    monkeypatch.setattr(type(x.place), "is_cpu_place", lambda place: False)  # the way of other devices
    np.testing.assert_array_equal(shared.apply(x, inverse).numpy(), expected)


def test_tables_of_131072_tokens_take_at_most_100_mb():
    heads, head_dim = 16 + 2 + 2, 128  # ERNIE 4.5 0.3B
    for num_tokens in (1000, 5000, 131_072):
        assert rotary.table_bytes(num_tokens, heads, head_dim) <= 100_000_000


def test_the_size_of_a_table_is_known_beforehand():
    for num_tokens, heads in ((100, 20), (3000, 72), (3000, 600)):
        table = Rotary(128, THETA).at(np.arange(num_tokens), heads - 1, 1).table
        assert table.numel().item() * 8 == rotary.table_bytes(num_tokens, heads, 128)
