"""Products by MKL, the math library in Paddle's wheel for x86, in memory of the caller: one (`sgemm`), or many of small
matrices in one call.

Paddle's own product of stacked matrices takes one size for all of them. The conversations of a batch have different
lengths, so that one size would multiply what is empty, too.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle

# Numbers of the CBLAS interface.
_BY_ROWS, _AS_STORED, _TRANSPOSED = 101, 111, 112


@lru_cache(maxsize=2)
def _function(name: str, *arguments: Any) -> Callable[..., None] | None:
    for file in sorted((Path(paddle.__file__).parent / "libs").glob("libmklml_intel.so*")):
        try:
            function = getattr(ctypes.CDLL(str(file)), name)
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = arguments, None
        return function
    return None


@lru_cache(maxsize=1)
def _sgemm_batch() -> Callable[..., None] | None:
    return _function("cblas_sgemm_batch", c_int, *[c_void_p] * 13, c_int, c_void_p)


@lru_cache(maxsize=1)
def _sgemm() -> Callable[..., None] | None:
    matrix = c_void_p, c_int
    return _function("cblas_sgemm", *[c_int] * 6, c_float, *matrix, *matrix, c_float, *matrix)


def is_available() -> bool:
    """Whether Paddle's wheel contains the library."""
    return _sgemm_batch() is not None and _sgemm() is not None


def sgemm(
    transpose_x: bool,
    transpose_y: bool,
    rows: int,
    columns: int,
    inner: int,
    x: tuple[int, int],
    y: tuple[int, int],
    out: tuple[int, int],
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """See onednn.gemm; of fp32 matrices."""
    function = _sgemm()
    assert function is not None
    how = (_TRANSPOSED if transposed else _AS_STORED for transposed in (transpose_x, transpose_y))
    function(_BY_ROWS, *how, rows, columns, inner, alpha, *x, *y, beta, *out)


class Products:
    """N products x_i y_i of fp32 matrices that are stored row by row: x_i [rows_i, inner_i] and y_i [inner_i,
    columns_i], or with `transpose_y` [columns_i, inner_i].

    Args:
        rows, columns, inner: integers [N], or one for all; at least one of them is an array.
        strides: numbers from one row to the next in the memory of each x, y and result.
    """

    def __init__(
        self,
        rows: np.ndarray | int,
        columns: np.ndarray | int,
        inner: np.ndarray | int,
        strides: tuple[int, int, int],
        transpose_y: bool,
    ) -> None:
        function = _sgemm_batch()
        assert function is not None
        self._function = function
        count = next(len(each) for each in (rows, columns, inner) if isinstance(each, np.ndarray))

        def each(value: float | np.ndarray, dtype: type = np.int32) -> np.ndarray:
            made: np.ndarray = np.empty(count, dtype)
            made[:] = value
            return made

        sizes = each(rows), each(columns), each(inner)
        orders = each(_AS_STORED), each(_TRANSPOSED if transpose_y else _AS_STORED)
        factors = each(1, np.float32), each(0, np.float32)
        by = tuple(each(stride) for stride in strides)
        self._arrays = (*orders, *sizes, *factors, *by)  # MKL reads them at every call
        alpha, beta = (address_of(factor) for factor in factors)
        self._head = _BY_ROWS, *(address_of(array) for array in (*orders, *sizes)), alpha
        self._by_x, self._by_y, self._by_out = (address_of(stride) for stride in by)
        self._beta, self._ones, self._count = beta, each(1), count
        self._tail = count, address_of(self._ones)

    def run(self, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
        """Write the products to `out`; each argument has the addresses of N matrices, uint64 [N]."""
        x_at, y_at, out_at = address_of(x), address_of(y), address_of(out)
        self._function(*self._head, x_at, self._by_x, y_at, self._by_y, self._beta, out_at, self._by_out, *self._tail)


def address_of(array: np.ndarray) -> int:
    """Where the memory of an array begins."""
    return array.__array_interface__["data"][0]


def addresses(start: int, count: int, size: int) -> np.ndarray:
    """Where each of `count` matrices of `size` fp32 numbers begins, one behind another from `start`: uint64 [count]."""
    return np.uint64(start) + np.uint64(4 * size) * np.arange(count, dtype=np.uint64)
