"""Tokens reach their experts and come back, each with its weight."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.moe.dispatch import assign, combine, dispatch

CHOICES = {
    "spread": [[0, 2], [2, 1], [3, 0], [1, 3], [2, 3]],
    "crowded": [[2, 0]] * 5,  # experts 1 and 3 get nothing
    "single": [[3], [0], [3], [3], [1]],
    "one token": [[1, 3, 0]],
}


def choice(name: str) -> np.ndarray:
    return np.array(CHOICES[name], dtype=np.int64)


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_sorted_by_expert_and_then_by_token(name: str):
    experts = choice(name)
    assignment = assign(experts, 4)
    assert assignment.counts == [int((experts == e).sum()) for e in range(4)]
    expected = [token for e in range(4) for token in range(len(experts)) if e in experts[token]]
    assert assignment.source.numpy().tolist() == expected


@pytest.mark.parametrize("name", CHOICES)
def test_dispatch_and_combine_with_identity_experts_are_the_weighted_sum(name: str):
    random = np.random.default_rng(0)
    experts = choice(name)
    tokens, top_k = experts.shape
    x, weights = random.normal(size=(tokens, 6)), random.normal(size=(tokens, top_k))
    scale, upstream = random.normal(size=(4, 6)), random.normal(size=(tokens, 6))

    def formula(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Expert e multiplies by scale[e]."""
        return np.stack([sum(weights[t, k] * x[t] * scale[experts[t, k]] for k in range(top_k)) for t in range(tokens)])

    x_t, weights_t = (paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in (x, weights))
    assignment = assign(experts, 4)
    by_row = paddle.to_tensor(np.repeat(scale, assignment.counts, axis=0).astype(np.float32))
    y = combine(dispatch(x_t, assignment) * by_row, weights_t, assignment)
    np.testing.assert_allclose(y.numpy(), formula(x, weights), rtol=1e-5, atol=1e-6)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    for which, ours in enumerate((x_t, weights_t)):
        expected = numeric_gradient(formula, [x, weights], which, upstream)
        np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_only_the_trainable_input_of_combine_gets_a_gradient(frozen: str):
    assignment = assign(choice("spread"), 4)
    tensors = {"rows": paddle.ones([10, 3]), "weights": paddle.full([5, 2], 0.5)}
    for name, value in tensors.items():
        value.stop_gradient = name == frozen
    combine(tensors["rows"], tensors["weights"], assignment).sum().backward()
    assert {name for name, value in tensors.items() if value.grad is None} == {frozen}


def test_dispatch_does_not_change_its_inputs():
    experts = choice("spread")
    x = paddle.to_tensor(np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32), stop_gradient=False)
    weights = paddle.full([5, 2], 0.5)
    weights.stop_gradient = False
    before = x.numpy().copy()
    assignment = assign(experts, 4)
    rows = dispatch(x, assignment)
    kept = rows.numpy().copy()
    combine(rows, weights, assignment).sum().backward()
    np.testing.assert_array_equal(x.numpy(), before)
    np.testing.assert_array_equal(rows.numpy(), kept)
    np.testing.assert_allclose(x.grad.numpy(), 1.0)
