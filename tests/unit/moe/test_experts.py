"""Gated experts against one product a row in numpy."""

import numpy as np
import paddle
import pytest
from support.by_expert import products
from support.numeric import numeric_gradient

from erniekit.moe.experts import Experts

COUNTS = [[2, 3, 1], [0, 6, 0], [6, 0, 0], [0, 0, 6], [3, 0, 3]]


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
