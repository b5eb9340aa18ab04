"""Products of sorted rows against one product a row in numpy."""

import numpy as np
import paddle
import pytest
from support.by_expert import products
from support.numeric import numeric_gradient

from erniekit.nn import cpu_ops
from erniekit.nn.grouped import grouped_matmul, row_spans

COUNTS = [[2, 3, 1], [0, 6, 0], [6, 0, 0], [0, 0, 6], [3, 0, 3]]


def test_spans_leave_out_groups_without_rows():
    assert row_spans([2, 0, 3]) == [(0, 0, 2), (2, 2, 5)] and row_spans([0, 0]) == []


def test_products_are_written_into_parts_of_a_tensor():
    """Paddle's slices of the first axis are views: a copy would leave the tensor as it was."""
    out = paddle.full([6, 5], -1.0)
    x, y = (paddle.to_tensor(np.random.default_rng(n).normal(size=(3, 4 + n)).astype(np.float32)) for n in range(2))
    cpu_ops.matmul_into(out[2:5], x[:, :3].contiguous(), y)
    np.testing.assert_allclose(out[2:5].numpy(), x.numpy()[:, :3] @ y.numpy(), rtol=1e-5)
    assert (out.numpy()[[0, 1, 5]] == -1).all()
    stack = paddle.full([2, 4, 5], -1.0)
    cpu_ops.matmul_into(stack[1], x, y, transpose_x=True)
    np.testing.assert_allclose(stack[1].numpy(), x.numpy().T @ y.numpy(), rtol=1e-5)
    assert (stack.numpy()[0] == -1).all()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_meets_its_own_expert(counts: list[int]):
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


def test_experts_learn_from_rows_that_want_no_gradient():
    """A sparse first layer over frozen embeddings."""
    weight = paddle.ones([3, 4, 5])
    weight.stop_gradient = False
    grouped_matmul(paddle.ones([6, 4]), weight, [2, 3, 1]).sum().backward()
    np.testing.assert_allclose(weight.grad.numpy()[:, 0, 0], [2.0, 3.0, 1.0])
