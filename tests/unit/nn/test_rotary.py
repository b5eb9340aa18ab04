"""Rotary embedding of interleaved pairs against the rotation matrix."""

import numpy as np
import paddle

from erniekit.nn.rotary import rotate, rotation_table

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
    table = rotation_table(positions, 8, THETA, 3, 2)
    y = rotate(paddle.to_tensor(x), table).numpy()
    np.testing.assert_allclose(y, rotated(x, positions, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y[:, 3:], x[:, 3:])
    np.testing.assert_array_equal(y[[0, 3]], x[[0, 3]])


def test_the_inverse_undoes_and_is_the_adjoint():
    random = np.random.default_rng(1)
    table = rotation_table(np.arange(7) * 11, 16, THETA, 2, 1)
    x, y = (random.normal(size=(7, 3, 16)).astype(np.float32) for _ in "xy")
    there = rotate(paddle.to_tensor(x), table)
    np.testing.assert_allclose(rotate(there, table, inverse=True).numpy(), x, atol=2e-6)
    back = rotate(paddle.to_tensor(y), table, inverse=True).numpy()
    np.testing.assert_allclose((there.numpy() * y).sum(), (x * back).sum(), rtol=1e-4)


def test_scores_depend_on_distance_alone():
    random = np.random.default_rng(2)
    q, k = (random.normal(size=(1, 1, 32)).astype(np.float32) for _ in "qk")

    def score(i: int, j: int) -> float:
        turned = [
            rotate(paddle.to_tensor(x), rotation_table(np.array([p]), 32, THETA, 1, 0)).numpy()
            for x, p in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(score(1005, 1000), score(5, 0), rtol=1e-3)
    assert abs(score(5, 0) - score(6, 0)) > 1e-3
