"""The 16-bit products of oneDNN, on processors that have them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
import pytest

from erniekit.nn import onednn
from erniekit.utils import runtime

HALF_ULP = {paddle.bfloat16: 2.0**-8, paddle.float16: 2.0**-11}


@pytest.fixture
def forgets() -> Iterator[None]:
    """What a test makes of the library is forgotten after it."""
    for cached in (onednn._library, onednn.is_available):
        cached.cache_clear()
    yield
    for cached in (onednn._library, onednn.is_available):
        cached.cache_clear()


@pytest.fixture(params=HALF_ULP, ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> paddle.dtype:
    if not onednn.is_available(request.param):
        pytest.skip("this processor has no instructions for it")
    return request.param


def matrix(dtype: paddle.dtype, *shape: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)).astype(dtype)


def exact(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.astype("float32").numpy().astype(np.float64)


def assert_product(found: paddle.Tensor, left: np.ndarray, right: np.ndarray, dtype: paddle.dtype) -> None:
    """Summed in fp32 and rounded once."""
    assert found.dtype == dtype and found.shape == [left.shape[0], right.shape[1]]
    error = np.abs(exact(found) - left @ right)
    assert (error <= HALF_ULP[dtype] * np.abs(left @ right) + 1e-6 * (np.abs(left) @ np.abs(right)) + 1e-7).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (64, 96, 32), (130, 257, 65), (2, 2048, 3)])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_summed_in_fp32(dtype: paddle.dtype, sizes: tuple[int, int, int], transposed: tuple[bool, bool]):
    rows, inner, columns = sizes
    x = matrix(dtype, *((inner, rows) if transposed[0] else (rows, inner)))
    y = matrix(dtype, *((columns, inner) if transposed[1] else (inner, columns)))
    left, right = (exact(t).T if turned else exact(t) for t, turned in zip((x, y), transposed, strict=True))
    assert_product(onednn.matmul(x, y, *transposed), left, right, dtype)


def test_views_of_other_tensors_are_multiplied_by_their_values(dtype: paddle.dtype):
    whole = matrix(dtype, 6, 40)
    x, y = whole[1:4], matrix(dtype, 8, 40).T
    assert_product(onednn.matmul(x, y), exact(x), exact(y), dtype)
    columns = whole[:, 3:20]
    assert_product(onednn.matmul(columns, columns, transpose_y=True), exact(columns), exact(columns).T, dtype)


def test_the_same_product_has_the_same_bits_whatever_was_multiplied_between(dtype: paddle.dtype):
    x, y = matrix(dtype, 100, 300), matrix(dtype, 300, 50)
    first = onednn.matmul(x, y)
    others = [onednn.matmul(matrix(dtype, rows, 300), y) for rows in (1, 100, 101)]
    assert onednn.matmul(x, y).numpy().tobytes() == first.numpy().tobytes()
    assert exact(others[1]).any()


def test_many_sizes_are_forgotten_again(dtype: paddle.dtype):
    for rows in range(1, 600):
        onednn.matmul(matrix(dtype, rows, 2), matrix(dtype, 2, 1))
    assert onednn._product.cache_info().currsize <= 512


def test_a_processor_without_the_instructions_does_not_use_it(forgets: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2", "avx512f", "avx512_fp16"})
    assert not onednn.is_available(paddle.bfloat16)
    assert not onednn.is_available(paddle.float64)


def test_a_wheel_without_the_library_does_not_use_it(forgets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "__init__.py"))
    assert not onednn.is_available(paddle.bfloat16)
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "libdnnl.so.3").write_bytes(b"not a library")
    for cached in (onednn._library, onednn.is_available):
        cached.cache_clear()
    assert not onednn.is_available(paddle.bfloat16)
