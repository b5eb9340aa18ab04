"""Products of 16-bit matrices on a CPU, by the oneDNN library that Paddle's wheel contains.

Paddle multiplies such matrices in inference programs only, not in operations that run one at a time. So the library's C
interface is called on the memory of the tensors. It sums in fp32 and rounds once. The processor must have instructions
for the dtype (avx512_bf16 or avx512_fp16; processors with AMX have both); elsewhere it would be slower than fp32.
"""

import ctypes
from ctypes import byref, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import paddle

from erniekit.utils import runtime

_FLAGS = {paddle.bfloat16: "avx512_bf16", paddle.float16: "avx512_fp16"}
# Numbers of oneDNN's C interface (dnnl_types.h).
_DATA_TYPES = {paddle.float16: 1, paddle.bfloat16: 2}
_CPU, _IN_ORDER = 1, 1
_SOURCE, _WEIGHTS, _RESULT = 1, 33, 17
_Dims = c_int64 * 12


class _Argument(ctypes.Structure):
    _fields_ = [("kind", c_int), ("memory", c_void_p)]


@lru_cache(maxsize=8)
def is_available(dtype: paddle.dtype) -> bool:
    """Whether this process can multiply matrices of a dtype on its CPU."""
    return dtype in _FLAGS and _FLAGS[dtype] in runtime.cpu_flags() and _library() is not None


def matmul(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False) -> paddle.Tensor:
    """The product [rows, columns] of two matrices of one available dtype that are not empty, in that dtype. No
    gradient.
    """
    assert x.dtype == y.dtype and is_available(x.dtype), (x.dtype, y.dtype)
    x, y = x.contiguous(), y.contiguous()
    (rows, inner), (other, columns) = _shape(x, transpose_x), _shape(y, transpose_y)
    assert inner == other, (x.shape, y.shape)
    out = paddle.empty([rows, columns], dtype=x.dtype)
    product = _product(_DATA_TYPES[x.dtype], rows, inner, columns, transpose_x, transpose_y)
    product.run(x.data_ptr(), y.data_ptr(), out.data_ptr())
    return out


def _shape(matrix: paddle.Tensor, transposed: bool) -> tuple[int, int]:
    rows, columns = matrix.shape
    return (columns, rows) if transposed else (rows, columns)


class _Library:
    """oneDNN with an engine and a stream of this process, which live as long as it does."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))
        self.engine, self.stream = c_void_p(), c_void_p()
        self.call("dnnl_engine_create", byref(self.engine), c_int(_CPU), ctypes.c_size_t(0))
        self.call("dnnl_stream_create", byref(self.stream), self.engine, c_int(_IN_ORDER))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status."""
        status = self._functions[name](*arguments)
        assert status == 0, f"oneDNN: {name}: status {status}"


@lru_cache(maxsize=1)
def _library() -> _Library | None:
    """The wheel's library; None if there is none that can be used."""
    for file in sorted((Path(paddle.__file__).parent / "libs").glob("libdnnl.so*")):
        try:
            return _Library(file)
        except (OSError, AttributeError, AssertionError):
            continue
    return None


class _Product:
    """A product of given sizes, compiled by oneDNN for this processor."""

    def __init__(
        self, data_type: int, rows: int, inner: int, columns: int, transpose_x: bool, transpose_y: bool
    ) -> None:
        library = _library()
        assert library is not None
        self._library, self._primitive, self._memories = library, c_void_p(), []
        layouts = ((rows, inner, transpose_x), (inner, columns, transpose_y), (rows, columns, False))
        descriptions = [self._describe(data_type, *layout) for layout in layouts]
        described = c_void_p()
        source, weights, result = descriptions
        library.call(
            "dnnl_matmul_primitive_desc_create", byref(described), library.engine, source, weights, None, result, None
        )
        library.call("dnnl_primitive_create", byref(self._primitive), described)
        library.call("dnnl_primitive_desc_destroy", described)
        for description in descriptions:
            memory = c_void_p()
            library.call("dnnl_memory_create", byref(memory), description, library.engine, c_void_p())
            library.call("dnnl_memory_desc_destroy", description)
            self._memories.append(memory)
        kinds = zip((_SOURCE, _WEIGHTS, _RESULT), self._memories, strict=True)
        self._arguments = (_Argument * 3)(*(_Argument(kind, memory) for kind, memory in kinds))

    def _describe(self, data_type: int, rows: int, columns: int, transposed: bool) -> c_void_p:
        """A matrix [rows, columns], stored by rows, or by columns if `transposed`."""
        description, strides = c_void_p(), (1, rows) if transposed else (columns, 1)
        self._library.call(
            "dnnl_memory_desc_create_with_strides",
            byref(description),
            c_int(2),
            _Dims(rows, columns),
            c_int(data_type),
            _Dims(*strides),
        )
        return description

    def run(self, *addresses: int) -> None:
        """Multiply the matrices at two addresses into that at a third."""
        for memory, address in zip(self._memories, addresses, strict=True):
            self._library.call("dnnl_memory_set_data_handle", memory, c_void_p(address))
        stream = self._library.stream
        self._library.call("dnnl_primitive_execute", self._primitive, stream, c_int(3), self._arguments)
        self._library.call("dnnl_stream_wait", stream)

    def __del__(self) -> None:
        for memory in self._memories:
            self._library.call("dnnl_memory_destroy", memory)
        if self._primitive:
            self._library.call("dnnl_primitive_destroy", self._primitive)


_product = lru_cache(maxsize=512)(_Product)
