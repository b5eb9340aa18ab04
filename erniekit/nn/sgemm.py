"""The product of two fp32 matrices in the memory of tensors, by the library that is the faster one for it."""

from erniekit.nn import mkl, onednn
from erniekit.utils import runtime

_LONG, _MANY = 256, 32  # terms of a sum, and rows, from which MKL is the faster one for x y^T with AVX-512


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
    """out [rows, columns] = alpha x y + beta out; see onednn.sgemm, which must be available.

    Measured on two threads (docs/speed.md): with AVX-512, MKL has up to 1.4 times the speed of oneDNN for x y^T, if
    rows are many and sums are long, and oneDNN is as fast or faster for the other products of training and decoding
    steps. With AVX2, MKL is as fast or faster for all, and takes half of oneDNN's time for an x^T y of few columns.
    """
    of_mkl = not runtime.has_avx512() or (transpose_y and not transpose_x and inner >= _LONG and rows >= _MANY)
    library = mkl if of_mkl and mkl.is_available() else onednn
    library.sgemm(transpose_x, transpose_y, rows, columns, inner, x, y, out, alpha, beta)
