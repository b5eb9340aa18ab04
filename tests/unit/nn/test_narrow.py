"""Operations on 16-bit tensors on a CPU: what fp32 gives from the same values, rounded once, forward and backward."""

from collections.abc import Callable

import numpy as np
import paddle
import pytest

from erniekit.nn import decoding, narrow, onednn

DTYPES = ("bfloat16", "float16")
INDEX = [2, 0, 2]


def tensors(dtype: str, *shapes: tuple[int, ...]) -> list[paddle.Tensor]:
    random = np.random.default_rng(len(shapes))
    made = [paddle.to_tensor(random.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]
    for tensor in made:
        tensor.stop_gradient = False
    return made


def wide(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.detach().astype("float32").numpy()


OPERATIONS: dict[str, tuple[Callable, Callable, tuple[tuple[int, ...], ...]]] = {
    "add": (narrow.add, paddle.add, ((3, 4), (4,))),
    "multiply": (narrow.multiply, paddle.multiply, ((3, 4), (3, 1))),
    "gather": (
        lambda x: narrow.gather(x, paddle.to_tensor(INDEX)),
        lambda x: paddle.gather(x, paddle.to_tensor(INDEX)),
        ((3, 4),),
    ),
    "concat": (
        lambda x, y: narrow.concat([x, y], axis=-1),
        lambda x, y: paddle.concat([x, y], axis=-1),
        ((3, 4), (3, 2)),
    ),
    "rounded": (
        lambda x: narrow.rounded(paddle.nn.functional.gelu, x),
        paddle.nn.functional.gelu,
        ((3, 4),),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_fp32_rounded_once(name: str, dtype: str):
    operation, reference, shapes = OPERATIONS[name]
    mine, others = tensors(dtype, *shapes), [t.astype("float32").detach() for t in tensors(dtype, *shapes)]
    for other in others:
        other.stop_gradient = False
    result, expected = operation(*mine), reference(*others)
    assert result.dtype == mine[0].dtype
    np.testing.assert_array_equal(wide(result), wide(expected.astype(dtype)))
    upstream = tensors(dtype, tuple(expected.shape))[0].detach()
    paddle.autograd.backward([result, expected], [upstream, upstream.astype("float32")])
    for tensor, other in zip(mine, others, strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype
        np.testing.assert_array_equal(wide(tensor.grad), wide(other.grad.astype(dtype)))


def reference_matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool, transpose_y: bool) -> np.ndarray:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.T if transpose_y else y)


# A sum in fp32, then rounded to 8 or 11 bits: half a unit in the last place, and nearly nothing more.
HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def assert_rounded(found: paddle.Tensor, exact: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(wide(found), exact, rtol=HALF_ULP[dtype] * 1.01, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize(("transpose_x", "transpose_y"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_product_and_its_gradients_are_rounded_once(dtype: str, lead: tuple[int, ...], transpose_x, transpose_y):
    if lead and transpose_x:
        pytest.skip("only a matrix is transposed")
    x, y = tensors(dtype, (*lead, *((70, 5) if transpose_x else (5, 70))), (3, 70) if transpose_y else (70, 3))
    z = narrow.matmul(x, y, transpose_x, transpose_y)
    assert z.dtype == x.dtype and z.shape == [*lead, 5, 3]
    wide_x, wide_y = wide(x).astype(np.float64), wide(y).astype(np.float64)
    assert_rounded(z, reference_matmul(wide_x, wide_y, transpose_x, transpose_y), dtype)
    upstream = tensors(dtype, tuple(z.shape))[0].detach()
    z.backward(upstream)
    assert x.grad.dtype == y.grad.dtype == x.dtype
    dz = wide(upstream).astype(np.float64)
    dx = dz @ (wide_y if transpose_y else wide_y.T)
    dy = wide_x.reshape(-1, wide_x.shape[-1]) if not transpose_x else wide_x.T
    dy = dy.T @ dz.reshape(-1, 3)
    assert_rounded(x.grad, dx.swapaxes(-1, -2) if transpose_x else dx, dtype)
    assert_rounded(y.grad, dy.T if transpose_y else dy, dtype)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_factor_gets_no_gradient(frozen: int):
    pair = tensors("bfloat16", (5, 8), (8, 3))
    pair[frozen].stop_gradient = True
    narrow.matmul(*pair).sum().backward()
    assert pair[frozen].grad is None and pair[1 - frozen].grad is not None


def test_products_without_the_processors_instructions_are_nearly_the_same(monkeypatch: pytest.MonkeyPatch):
    x, y = tensors("bfloat16", (33, 129), (129, 17))
    here = wide(narrow.matmul(x, y))
    monkeypatch.setattr(onednn, "is_available", lambda dtype: False)
    assert_rounded(narrow.matmul(x, y), wide(x).astype(np.float64) @ wide(y).astype(np.float64), "bfloat16")
    np.testing.assert_allclose(wide(narrow.matmul(x, y)), here, rtol=2.0**-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_no_rows(dtype: str):
    x, y = tensors(dtype, (0, 4), (4, 3))
    assert narrow.matmul(x, y).shape == [0, 3]


LARGE = 600, 500  # more numbers than one thread takes


def large_tensors(*shapes: tuple[int, int]) -> list[paddle.Tensor]:
    random = np.random.default_rng(0)
    return [paddle.to_tensor(random.normal(size=s).astype(np.float32), stop_gradient=False) for s in shapes]


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_large_fp32_products_and_their_gradients_are_those_of_paddle(transposed: tuple[bool, bool]):
    shapes = (LARGE[::-1] if transposed[0] else LARGE), ((40, 500) if transposed[1] else (500, 40))
    upstream = large_tensors((600, 40))[0].detach()
    results = []
    for product in (narrow.matmul, paddle.matmul):
        x, y = large_tensors(*shapes)
        z = product(x, y, transpose_x=transposed[0], transpose_y=transposed[1])
        (z * upstream).sum().backward()
        results.append((z.numpy(), x.grad.numpy(), y.grad.numpy()))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)  # sums of up to 600 terms, in another order


def test_a_large_fp32_product_keeps_leading_axes():
    x, y = large_tensors(LARGE, (500, 8))
    product = narrow.matmul(x.reshape([3, 200, 500]), y)
    np.testing.assert_allclose(product.numpy(), paddle.matmul(x, y).reshape([3, 200, 8]).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_term_or_factor_of_a_large_operation_gets_no_gradient(frozen: int):
    for operation, shapes in ((narrow.matmul, (LARGE, (500, 8))), (narrow.add, (LARGE, LARGE))):
        pair = large_tensors(*shapes)
        pair[frozen].stop_gradient = True
        operation(*pair).sum().backward()
        assert pair[frozen].grad is None and pair[1 - frozen].grad is not None


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize("swapped", [False, True])
def test_terms_of_a_large_sum_do_not_share_a_gradient(length: int, swapped: bool):
    """Paddle sums gradients in place: what one term gets from elsewhere must not reach the other. The lengths of the
    ways change which of the steps comes first.
    """
    a, b = large_tensors(LARGE, LARGE)
    x, y = a * 2.0, b * 2.0
    other = x
    for _ in range(length):
        other = other + 1.0
    z = narrow.add(y, x) if swapped else narrow.add(x, y)
    (z.sum() + (3.0 * other).sum()).backward()
    np.testing.assert_array_equal(a.grad.numpy(), np.full(LARGE, 8.0, np.float32))
    np.testing.assert_array_equal(b.grad.numpy(), np.full(LARGE, 2.0, np.float32))


def test_a_sum_with_a_row_stays_paddles_operation():
    x, row = large_tensors(LARGE, (1, 500))
    np.testing.assert_array_equal(narrow.add(x, row[0]).numpy(), (x + row[0]).numpy())


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("transpose_y", [False, True])
def test_products_of_generation_are_those_of_paddle(rows: int, transpose_y: bool):
    x, y = (tensor.detach() for tensor in large_tensors((rows, 30), (7, 30) if transpose_y else (30, 7)))
    expected = paddle.matmul(x, y, transpose_y=transpose_y).numpy()
    with decoding.running():
        np.testing.assert_allclose(narrow.matmul(x, y, transpose_y=transpose_y).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_small_fp32_operations_stay_paddles_own():
    x, y = tensors("float32", (6, 50), (50, 4))
    assert narrow.matmul(x, y).numpy().tobytes() == paddle.matmul(x, y).numpy().tobytes()
    assert narrow.add(x, x).numpy().tobytes() == (x + x).numpy().tobytes()
    assert not narrow.is_emulated(x)


def test_a_product_in_fp16_overflows_to_infinity():
    x = paddle.full([1, 2], 300.0, dtype="float16")
    assert wide(narrow.matmul(x, x, transpose_y=True)).tolist() == [[np.inf]]
