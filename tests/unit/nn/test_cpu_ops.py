"""Operations by oneDNN, and Paddle's in their place, against formulas in float64."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest

from erniekit.nn import cpu_ops, onednn
from erniekit.utils import runtime

# Rounding of fp32 inside an operation of a few steps, relative to numbers around 1.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
SHAPES = [(1, 1), (3, 5), (2, 3, 17), (2, 2, 40, 100), (300, 64)]


@pytest.fixture(params=["oneDNN", "Paddle"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both."""
    if request.param == "Paddle":
        monkeypatch.setattr(cpu_ops, "applies", lambda x: False)
    elif not onednn.is_available(paddle.float32):
        pytest.skip("this processor or wheel does not have it")
    return request.param


@pytest.fixture(params=[True, False], ids=["with AVX-512", "with AVX2"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen by the processor's instruction set."""
    monkeypatch.setattr(runtime, "has_avx512", lambda: request.param)


def random(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(shape[0]).normal(size=shape) * scale).astype(np.float32)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_is_computed_in_place(shape: tuple[int, ...]):
    scores = random(*shape, scale=4.0)
    x = paddle.to_tensor(scores)
    assert cpu_ops.softmax_(x) is x
    np.testing.assert_allclose(x.numpy(), softmax(scores), **CLOSE)


def test_softmax_of_hidden_and_of_large_scores():
    scores = np.array([[0.0, -1e30, 1.0], [-1e30, -1e30, -1e30], [5e4, 5e4, -5e4]], np.float32)
    found = cpu_ops.softmax_(paddle.to_tensor(scores)).numpy()
    # Paddle's own gives what is hidden e^-64.
    np.testing.assert_allclose(found, softmax(scores), rtol=1e-6, atol=1e-27)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_softmax_takes_the_place_of_the_upstream_one(shape: tuple[int, ...]):
    p, upstream = softmax(random(*shape)), random(*shape[::-1]).reshape(shape)
    dp = paddle.to_tensor(upstream)
    assert cpu_ops.softmax_backward_(dp, paddle.to_tensor(p.astype(np.float32))) is dp
    expected = p * (upstream - (p * upstream).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(dp.numpy(), expected, **CLOSE)


def test_views_are_read_in_their_order():
    whole = random(6, 8)
    columns = paddle.to_tensor(whole).T
    np.testing.assert_allclose(cpu_ops.softmax_(columns).numpy(), softmax(whole.T), **CLOSE)


def test_threads_do_not_disturb_one_another():
    """Each has operations of its own, since these keep the addresses of a call."""
    inputs = [random(200, 300, scale=1.0 + number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: cpu_ops.softmax_(paddle.to_tensor(x)).numpy(), inputs))
    for found, scores in zip(results, inputs, strict=True):
        np.testing.assert_allclose(found, softmax(scores), **CLOSE)


@pytest.mark.parametrize("factor", [1.0, 1.702])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swish_and_its_gradient_follow_the_formula(shape: tuple[int, ...], factor: float):
    x, upstream = random(*shape, scale=4.0), random(*shape[::-1]).reshape(shape)
    x.flat[0] = -200.0
    wide = x.astype(np.float64)
    sigmoid = 1.0 / (1.0 + np.exp(-factor * wide))
    np.testing.assert_allclose(cpu_ops.swish(paddle.to_tensor(x), factor).numpy(), wide * sigmoid, rtol=1e-5, atol=1e-5)
    dy = paddle.to_tensor(upstream)
    found = cpu_ops.swish_backward(dy, paddle.to_tensor(x), factor).numpy()
    expected = upstream * sigmoid * (1.0 + factor * wide * (1.0 - sigmoid))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dy.numpy(), upstream)


def test_products_of_equal_shapes():
    x, y = random(40, 50), random(50, 40).reshape(40, 50)
    left, right = paddle.to_tensor(x), paddle.to_tensor(y)
    np.testing.assert_array_equal(cpu_ops.multiply(left, right).numpy(), x * y)
    np.testing.assert_array_equal(left.numpy(), x)
    assert cpu_ops.multiply_(left, right) is left
    np.testing.assert_array_equal(left.numpy(), x * y)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_and_its_gradient_follow_the_formula(shape: tuple[int, ...]):
    x, upstream = random(*shape, scale=3.0), random(*shape[::-1]).reshape(shape)
    wide = x.astype(np.float64)
    below = np.vectorize(lambda value: 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))))(wide)
    np.testing.assert_allclose(cpu_ops.gelu(paddle.to_tensor(x)).numpy(), wide * below, rtol=1e-5, atol=2e-6)
    expected = upstream * (below + wide * np.exp(-0.5 * wide**2) / math.sqrt(2.0 * math.pi))
    found = cpu_ops.gelu_backward(paddle.to_tensor(upstream), paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)


def test_sums_and_differences():
    x, y = random(40, 50), random(50, 40).reshape(40, 50)
    for function, expected in ((cpu_ops.add_, x + y), (cpu_ops.subtract_, x - y)):
        left = paddle.to_tensor(x)
        assert function(left, paddle.to_tensor(y)) is left
        np.testing.assert_array_equal(left.numpy(), expected)
    left = paddle.to_tensor(x)
    np.testing.assert_array_equal(cpu_ops.add(left, paddle.to_tensor(y)).numpy(), x + y)
    np.testing.assert_array_equal(cpu_ops.copy(left).add_(left).numpy(), x + x)
    np.testing.assert_array_equal(left.numpy(), x)
    scores = random(2, 3, 40, 50)
    found = cpu_ops.add_to_each_(paddle.to_tensor(scores), paddle.to_tensor(y)).numpy()
    np.testing.assert_array_equal(found, scores + y)
    bias = random(50)
    np.testing.assert_array_equal(
        cpu_ops.add_to_each(paddle.to_tensor(scores), paddle.to_tensor(bias)).numpy(), scores + bias
    )


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
def test_products_are_written_to_rows_of_a_larger_tensor(transposed: tuple[bool, bool], path: str):
    if path == "Paddle":
        pytest.skip("callers ask first")
    x, y = random(7, 30), random(30, 5)
    given = [
        paddle.to_tensor(np.ascontiguousarray(m.T) if turn else m) for m, turn in zip((x, y), transposed, strict=True)
    ]
    out = paddle.full([9, 5], 3.0)
    cpu_ops.matmul_into(out[1:8], *given, *transposed)
    np.testing.assert_allclose(out.numpy()[1:8], x.astype(np.float64) @ y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.numpy()[[0, 8]], 3.0)


def test_rows_and_columns_are_scaled():
    x, y, rows, columns = random(40, 50), random(50, 40).reshape(40, 50), random(41, 1)[:40], random(50)
    given = paddle.to_tensor(x)
    np.testing.assert_array_equal(cpu_ops.scale_rows(given, paddle.to_tensor(rows)).numpy(), x * rows)
    found = cpu_ops.scale_rows_and_columns(given, paddle.to_tensor(rows), paddle.to_tensor(columns)).numpy()
    np.testing.assert_allclose(found, x * rows * columns, **CLOSE)
    total = paddle.to_tensor(y)
    assert cpu_ops.add_scaled_rows_(total, given, paddle.to_tensor(rows)) is total
    np.testing.assert_allclose(total.numpy(), y + x * rows, **CLOSE)
    np.testing.assert_array_equal(given.numpy(), x)


def test_swish_times_another_tensor():
    x, y = random(40, 50, scale=4.0), random(50, 40).reshape(40, 50)
    expected = x.astype(np.float64) / (1.0 + np.exp(-x.astype(np.float64))) * y
    found = cpu_ops.swish_times(paddle.to_tensor(x), paddle.to_tensor(y)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_pixels_are_standardised_bit_for_bit():
    levels = np.random.default_rng(0).integers(0, 256, (30, 12)).astype(np.float32)
    mean, std = random(12), random(13)[:12] ** 2 + np.float32(0.1)
    tables = (paddle.to_tensor(table) for table in (np.array([255.0], np.float32), mean, std))
    found = cpu_ops.standardise_(paddle.to_tensor(levels), *tables).numpy()
    np.testing.assert_array_equal(found, (levels / np.float32(255.0) - mean) / std)


def test_one_column_of_each_row_is_read_and_added_to():
    x, columns, values = random(6, 9), np.array([[3], [0], [8], [8], [1], [4]]), random(7, 1)[:6]
    given = paddle.to_tensor(x)
    rows = np.arange(6)[:, None]
    np.testing.assert_array_equal(cpu_ops.take_at(given, paddle.to_tensor(columns)).numpy(), x[rows, columns])
    assert cpu_ops.add_at_(given, paddle.to_tensor(columns), paddle.to_tensor(values)) is given
    x[rows, columns] += values
    np.testing.assert_array_equal(given.numpy(), x)
