"""The bfloat16 product of oneDNN, on processors that have one."""

from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from erniekit.nn import onednn
from erniekit.utils import runtime


@pytest.fixture
def forgets() -> Iterator[None]:
    """What a test makes of the processor is forgotten after it."""
    onednn._gemm.cache_clear()
    yield
    onednn._gemm.cache_clear()


needs_it = pytest.mark.skipif(not onednn.is_available(), reason="this processor has no bfloat16 instructions")


def bf16(*shape: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)).astype("bfloat16")


def exact(tensor: paddle.Tensor) -> np.ndarray:
    return tensor.astype("float32").numpy().astype(np.float64)


@needs_it
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (64, 96, 32), (130, 257, 65), (2, 2048, 3)])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_summed_in_fp32(sizes: tuple[int, int, int], transposed: tuple[bool, bool]):
    rows, inner, columns = sizes
    x = bf16(*((inner, rows) if transposed[0] else (rows, inner)))
    y = bf16(*((columns, inner) if transposed[1] else (inner, columns)))
    found = onednn.matmul(x, y, *transposed)
    assert found.dtype == paddle.float32 and found.shape == [rows, columns]
    left, right = (exact(t).T if turned else exact(t) for t, turned in zip((x, y), transposed, strict=True))
    scale = np.abs(left) @ np.abs(right)
    assert (np.abs(found.numpy() - left @ right) <= 1e-6 * scale).all()


@needs_it
def test_views_of_other_tensors_are_multiplied_by_their_values():
    whole = bf16(6, 40)
    x, y = whole[1:4], bf16(40, 8).T.contiguous().T
    np.testing.assert_allclose(onednn.matmul(x, y).numpy(), exact(x) @ exact(y), rtol=1e-4, atol=1e-5)
    columns = whole[:, 3:20]
    np.testing.assert_allclose(
        onednn.matmul(columns, columns, transpose_y=True).numpy(),
        exact(columns) @ exact(columns).T,
        rtol=1e-4,
        atol=1e-5,
    )


@needs_it
def test_the_same_product_has_the_same_bits():
    x, y = bf16(100, 300), bf16(300, 50)
    assert len({onednn.matmul(x, y).numpy().tobytes() for _ in range(5)}) == 1


def test_a_processor_without_the_instructions_does_not_use_it(forgets: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2", "avx512f"})
    assert not onednn.is_available()


def test_a_wheel_without_the_library_does_not_use_it(forgets: None, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "__init__.py"))
    assert not onednn.is_available()
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "libdnnl.so.3").write_bytes(b"not a library")
    onednn._gemm.cache_clear()
    assert not onednn.is_available()
