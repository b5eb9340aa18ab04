"""Stacked experts against one product an expert in numpy."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.moe.experts import Experts, grouped_matmul

COUNTS = [[2, 3, 1], [0, 6, 0], [6, 0, 0], [0, 0, 6], [3, 0, 3]]


def products(rows: np.ndarray, weight: np.ndarray, counts: list[int]) -> np.ndarray:
    expert = np.repeat(np.arange(len(counts)), counts)
    return np.stack([row @ weight[e] for row, e in zip(rows, expert, strict=True)])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_is_multiplied_by_its_expert(counts: list[int]):
    random = np.random.default_rng(0)
    rows, weight, upstream = random.normal(size=(6, 4)), random.normal(size=(3, 4, 5)), random.normal(size=(6, 5))
    rows_t, weight_t = (paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in (rows, weight))
    y = grouped_matmul(rows_t, weight_t, counts)
    np.testing.assert_allclose(y.numpy(), products(rows, weight, counts), rtol=1e-4, atol=1e-5)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    for which, ours in enumerate((rows_t, weight_t)):
        expected = numeric_gradient(lambda r, w: products(r, w, counts), [rows, weight], which, upstream)
        np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-3, atol=1e-4)
    for expert, count in enumerate(counts):
        if count == 0:  # a zero gradient, not none: the optimizer and every rank see the same tensors
            assert not weight_t.grad.numpy()[expert].any()


def test_frozen_experts_pass_the_gradient_on():
    rows = paddle.ones([6, 4])
    rows.stop_gradient = False
    weight = paddle.ones([3, 4, 5])
    grouped_matmul(rows, weight, [2, 3, 1]).sum().backward()
    assert weight.grad is None
    np.testing.assert_allclose(rows.grad.numpy(), 5.0)


def test_experts_get_gradients_from_rows_without_gradient():
    """A sparse first layer over frozen embeddings."""
    weight = paddle.ones([3, 4, 5])
    weight.stop_gradient = False
    grouped_matmul(paddle.ones([6, 4]), weight, [2, 3, 1]).sum().backward()
    np.testing.assert_allclose(weight.grad.numpy()[:, 0, 0], [2.0, 3.0, 1.0])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_an_expert_is_a_swiglu_block(counts: list[int]):
    paddle.seed(0)
    experts = Experts(3, 4, 5, init_std=0.5)
    random = np.random.default_rng(1)
    rows, upstream = random.normal(size=(6, 4)), random.normal(size=(6, 4))
    weights = [np.float64(p.numpy()) for p in (experts.up_gate_proj.weight, experts.down_proj.weight)]

    def formula(rows: np.ndarray, up_gate: np.ndarray, down: np.ndarray) -> np.ndarray:
        gate, up = np.split(products(rows, up_gate, counts), 2, axis=-1)
        return products(gate / (1 + np.exp(-gate)) * up, down, counts)

    rows_t = paddle.to_tensor(rows.astype(np.float32), stop_gradient=False)
    y = experts(rows_t, counts)
    np.testing.assert_allclose(y.numpy(), formula(rows, *weights), rtol=1e-4, atol=1e-5)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    for which, ours in enumerate((rows_t, experts.up_gate_proj.weight, experts.down_proj.weight)):
        expected = numeric_gradient(formula, [rows, *weights], which, upstream)
        np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-3, atol=1e-4)
