"""The product of two fp32 matrices in the memory of tensors, by the library that is the faster one for how they lie."""

from erniekit.nn import mkl, onednn

_LONG, _MANY = 256, 32  # terms of a sum, and rows, from which MKL is the faster one for x y^T


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

    On two threads MKL computes x y^T with up to 1.4 times the speed of oneDNN, if rows are many and sums are long;
    oneDNN is as fast or faster for the other products of training and decoding steps (docs/speed.md).
    """
    of_mkl = transpose_y and not transpose_x and inner >= _LONG and rows >= _MANY and mkl.is_available()
    library = mkl if of_mkl else onednn
    library.sgemm(transpose_x, transpose_y, rows, columns, inner, x, y, out, alpha, beta)
