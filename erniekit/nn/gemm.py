"""The product of two matrices in the memory of tensors, in fp32, by the library that is the faster one for it."""

import paddle

from erniekit.nn import mkl, onednn
from erniekit.utils import runtime

_LONG, _MANY = 256, 32  # terms of a sum, and rows, from which MKL is the faster one for x y^T with AVX-512


def gemm(
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
    factors: paddle.dtype = paddle.float32,
) -> None:
    """out [rows, columns] = alpha x y + beta out; see onednn.gemm, which must be available. `factors`: the dtype of x
    and y, float32 or, from nn/factors.py, bfloat16.

    Measured on two threads (docs/speed.md): with AVX-512, MKL has up to 1.4 times the speed of oneDNN for x y^T, if
    rows are many and sums are long, and oneDNN is as fast or faster for the other products of training and decoding
    steps. With AVX2, MKL is as fast or faster for all, and takes half of oneDNN's time for an x^T y of few columns.
    """
    sizes, matrices = (transpose_x, transpose_y, rows, columns, inner), (x, y, out)
    by_mkl = not runtime.has_avx512() or (transpose_y and not transpose_x and inner >= _LONG and rows >= _MANY)
    if by_mkl and factors == paddle.float32 and mkl.is_available():
        mkl.sgemm(*sizes, *matrices, alpha, beta)
    else:
        onednn.gemm(*sizes, *matrices, alpha, beta, factors)
