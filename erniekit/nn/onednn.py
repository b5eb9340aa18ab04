"""Products of bfloat16 matrices on a CPU, by the oneDNN library that Paddle's wheel contains.

Paddle has a bfloat16 product for a CPU in inference programs only, not for tensors that are computed one operation at a
time. So the library's function is called on the memory of the tensors. It needs a processor with bfloat16 instructions
(avx512_bf16, amx_bf16), and is not used elsewhere.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import paddle

from erniekit.utils import runtime

_FLAG = "avx512_bf16"  # every processor with amx_bf16 has it, too


def is_available() -> bool:
    """Whether this process can multiply bfloat16 matrices on its CPU."""
    return _gemm() is not None


def matmul(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False) -> paddle.Tensor:
    """The product of two matrices, bfloat16 and not empty, summed in fp32: fp32 [rows, columns]. No gradient."""
    gemm = _gemm()
    assert gemm is not None and x.dtype == y.dtype == paddle.bfloat16, (x.dtype, y.dtype)
    x, y = x.contiguous(), y.contiguous()
    (rows, inner), (other, columns) = _shape(x, transpose_x), _shape(y, transpose_y)
    assert inner == other, (x.shape, y.shape)
    out = paddle.empty([rows, columns], dtype="float32")
    status = gemm(
        b"T" if transpose_x else b"N",
        b"T" if transpose_y else b"N",
        rows,
        columns,
        inner,
        1.0,
        x.data_ptr(),
        x.shape[1],
        y.data_ptr(),
        y.shape[1],
        0.0,
        out.data_ptr(),
        columns,
    )
    assert status == 0, f"oneDNN: status {status}"
    return out


def _shape(matrix: paddle.Tensor, transposed: bool) -> tuple[int, int]:
    rows, columns = matrix.shape
    return (columns, rows) if transposed else (rows, columns)


@lru_cache(maxsize=1)
def _gemm() -> Callable[..., int] | None:
    """dnnl_gemm_bf16bf16f32 of row-major matrices; None where the wheel or the processor lacks it."""
    if _FLAG not in runtime.cpu_flags():
        return None
    for file in sorted((Path(paddle.__file__).parent / "libs").glob("libdnnl.so*")):
        try:
            gemm = ctypes.CDLL(str(file)).dnnl_gemm_bf16bf16f32
        except (OSError, AttributeError):
            continue
        size, matrix, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
        gemm.restype = ctypes.c_int
        gemm.argtypes = [ctypes.c_char] * 2 + [size] * 3 + [number, matrix, size, matrix, size, number, matrix, size]
        return gemm
    return None
