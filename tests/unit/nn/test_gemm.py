"""Products of fp32 matrices in place, by both libraries."""

import numpy as np
import paddle
import pytest

from erniekit.nn import gemm, mkl, onednn
from erniekit.utils import runtime

pytestmark = pytest.mark.skipif(
    not (onednn.is_available(paddle.float32) and mkl.is_available()), reason="the libraries are not in this wheel"
)


def places(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.strides[0] // array.itemsize


@pytest.mark.parametrize("library", [onednn.gemm, mkl.sgemm, gemm.gemm], ids=["onednn", "mkl", "chosen"])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("inner", [3, 300])  # sums below and above the length from which MKL is chosen
def test_a_product_is_added_to_columns_of_a_larger_matrix(library, transposed: tuple[bool, bool], inner: int):
    random = np.random.default_rng(inner)
    rows, columns = 35, 7
    x_shape = (inner, rows) if transposed[0] else (rows, inner)
    y_shape = (columns, inner) if transposed[1] else (inner, columns)
    # Parts of wider matrices, so that a row does not begin where the one before it ends.
    x, y = (random.normal(size=(n, m + 2)).astype(np.float32)[:, 1 : m + 1] for n, m in (x_shape, y_shape))
    whole = random.normal(size=(rows, columns + 3)).astype(np.float32)
    before, out = whole.copy(), whole[:, 2 : columns + 2]
    left, right = (matrix.T if turned else matrix for matrix, turned in zip((x, y), transposed, strict=True))
    expected = 0.5 * left.astype(np.float64) @ right.astype(np.float64) + 2.0 * out
    library(*transposed, rows, columns, inner, places(x), places(y), places(out), alpha=0.5, beta=2.0)
    # 1e-6 of what is summed: rounding of sums of up to 300 terms in fp32.
    bound = 1e-6 * (np.abs(left) @ np.abs(right) + np.abs(before[:, 2 : columns + 2])) + 1e-6
    assert (np.abs(out - expected) <= bound).all()
    np.testing.assert_array_equal(whole[:, :2], before[:, :2])
    np.testing.assert_array_equal(whole[:, columns + 2 :], before[:, columns + 2 :])


@pytest.mark.parametrize("has_avx512", [True, False], ids=["with AVX-512", "with AVX2"])
def test_the_library_follows_from_the_processor_and_from_how_the_matrices_lie(
    has_avx512: bool, monkeypatch: pytest.MonkeyPatch
):
    called: list[str] = []
    monkeypatch.setattr(runtime, "has_avx512", lambda: has_avx512)
    for name, library in (("sgemm", mkl), ("gemm", onednn)):
        monkeypatch.setattr(library, name, lambda *arguments, name=name: called.append(name))
    none = (0, 1)
    for transposed, rows, inner in (
        ((False, True), 32, 256),
        ((False, True), 31, 256),
        ((False, True), 32, 255),
        ((False, False), 32, 256),
        ((True, True), 32, 256),
    ):
        gemm.gemm(*transposed, rows, 4, inner, none, none, none)
    assert called == (["sgemm", "gemm", "gemm", "gemm", "gemm"] if has_avx512 else ["sgemm"] * 5)


def test_onednn_multiplies_where_mkl_is_absent(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    monkeypatch.setattr(mkl, "is_available", lambda: False)
    monkeypatch.setattr(onednn, "gemm", lambda *arguments: called.append("onednn"))
    gemm.gemm(False, True, 32, 4, 256, (0, 1), (0, 1), (0, 1))
    assert called == ["onednn"]
