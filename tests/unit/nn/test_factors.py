"""Products whose factors are rounded to bf16: those of the rounded values, summed in fp32, forward and backward."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from erniekit.moe.router import Gate
from erniekit.nn import cpu_ops, decoding, factors, grouped, mlp, narrow, onednn
from erniekit.nn.linear import Linear
from erniekit.nn.onednn import gemm

pytestmark = pytest.mark.skipif(not onednn.multiplies_bf16(), reason="this processor has no bf16 products")
COUNTS = [3, 0, 5]  # rows of each expert


def normal(*shape: int, seed: int = 0) -> paddle.Tensor:
    made = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return paddle.to_tensor(made, stop_gradient=False)


def rounded(x: paddle.Tensor | np.ndarray) -> np.ndarray:
    """The bf16 values nearest to x, by another library."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def assert_product(out: paddle.Tensor, left: np.ndarray, right: np.ndarray) -> None:
    """`out` is the product of two rounded matrices but for the rounding of sums in fp32: 2e-6 of what is summed. One
    factor that is not rounded is a thousand times as far off.
    """
    assert out.dtype == paddle.float32
    difference = np.abs(out.numpy().reshape(len(left), -1) - left @ right)
    assert (difference <= 2e-6 * (np.abs(left) @ np.abs(right))).all()


def test_factors_are_rounded_to_the_nearest_value_ties_to_even():
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20]
    special = [0.0, -0.0, np.inf, -np.inf, 3.4e38, 2.0**-126, np.nan]
    numbers = np.float32([*ties, *special, *np.random.default_rng(0).normal(size=1000)])
    x = paddle.to_tensor(numbers)
    with factors.rounded():
        bits = factors.factor(x).view("int16").numpy()
    made, expected = (each.astype(np.float32) for each in (bits.view(ml_dtypes.bfloat16), numbers.astype("bfloat16")))
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(np.signbit(made), np.signbit(expected))


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_a_product_of_bf16_matrices_is_summed_in_fp32(transposed: tuple[bool, bool]):
    rows, columns, inner = 35, 7, 300
    x = normal(*((inner, rows) if transposed[0] else (rows, inner)))
    y = normal(*((columns, inner) if transposed[1] else (inner, columns)), seed=1)
    out = normal(rows, columns, seed=2)
    left, right = (rounded(m).T if turned else rounded(m) for m, turned in zip((x, y), transposed, strict=True))
    expected, size = 0.5 * left @ right + 2.0 * out.numpy(), np.abs(left) @ np.abs(right) + np.abs(out.numpy())
    with factors.rounded():
        narrow_x, narrow_y = factors.factor(x), factors.factor(y)
    places = (cpu_ops.row_address(matrix) for matrix in (narrow_x, narrow_y, out))
    gemm(*transposed, rows, columns, inner, *places, alpha=0.5, beta=2.0, factors=paddle.bfloat16)
    assert (np.abs(out.numpy() - expected) <= 2e-6 * size).all()


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("transpose_y", [False, True])
def test_a_projection_rounds_factors_in_both_directions(lead: tuple[int, ...], transpose_y: bool):
    x, y, dz = normal(*lead, 5, 70), normal(*((3, 70) if transpose_y else (70, 3)), seed=1), normal(*lead, 5, 3, seed=2)
    with factors.rounded():
        z = narrow.matmul(x, y, transpose_y=transpose_y)
        z.backward(dz)
    matrix = rounded(y).T if transpose_y else rounded(y)
    flat_x, flat_dz = rounded(x).reshape(-1, 70), rounded(dz).reshape(-1, 3)
    assert z.shape == [*lead, 5, 3]
    assert_product(z, flat_x, matrix)
    assert_product(x.grad, flat_dz, matrix.T)
    assert_product(y.grad.T if transpose_y else y.grad, flat_x.T, flat_dz)


def test_experts_round_factors_in_both_directions():
    x, w, dz = normal(8, 70), normal(3, 70, 4, seed=1), normal(8, 4, seed=2)
    with factors.rounded():
        z = grouped.grouped_matmul(x, w, COUNTS)
        z.backward(dz)
    for expert, begin, end in grouped.row_spans(COUNTS):
        rows, matrix, drows = rounded(x)[begin:end], rounded(w)[expert], rounded(dz)[begin:end]
        assert_product(z[begin:end], rows, matrix)
        assert_product(x.grad[begin:end], drows, matrix.T)
        assert_product(w.grad[expert], rows.T, drows)
    assert not w.grad[1].any()


def test_gate_and_up_round_factors_in_both_directions():
    layer = Linear(70, 8, parts={"gate": 4, "up": 4})
    x, dy = normal(8, 70), normal(8, 4, seed=2)
    with factors.rounded():
        y = mlp.gated(layer, x)
        y.backward(dy)
    matrix = rounded(layer.weight)
    products = rounded(x) @ matrix
    gate, up = products[:, :4], products[:, 4:]
    sigmoid = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(y.numpy(), gate * sigmoid * up, rtol=1e-5, atol=1e-5)
    dgate = dy.numpy() * up * sigmoid * (1 + gate * (1 - sigmoid))
    grads = np.concatenate([dgate, dy.numpy() * gate * sigmoid], axis=1)
    # The gradients of gate and up are rounded themselves; where fp32 lies beside a tie, to one value or the other.
    np.testing.assert_allclose(x.grad.numpy(), rounded(grads) @ matrix.T, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(layer.weight.grad.numpy(), rounded(x).T @ rounded(grads), rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_gets_no_gradient(frozen: int):
    pair = [normal(5, 8), normal(8, 3)]
    pair[frozen].stop_gradient = True
    with factors.rounded():
        narrow.matmul(*pair).sum().backward()
    assert pair[frozen].grad is None and pair[1 - frozen].grad is not None


def test_routers_and_generation_keep_fp32_factors():
    gate, x, y = Gate(600, 4, 1), normal(500, 600), normal(600, 4, seed=1)
    logits, product = gate(x), paddle.matmul(x, y)
    with factors.rounded():
        np.testing.assert_array_equal(gate(x).numpy(), logits.numpy())
        assert not np.allclose(narrow.matmul(x, y).numpy(), product.numpy(), rtol=1e-4)
        with decoding.running():
            np.testing.assert_allclose(narrow.matmul(x, y).numpy(), product.numpy(), rtol=1e-4, atol=1e-4)
    assert not factors.are_rounded()
    np.testing.assert_allclose(narrow.matmul(x, y).numpy(), product.numpy(), rtol=1e-4, atol=1e-4)
