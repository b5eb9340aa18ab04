"""The oneDNN library that Paddle's wheel contains, called by its public C interface on the memory of tensors.

Paddle itself uses it in inference programs only, not in operations that run one at a time. Here are the library, its
compiled operations, and products: of fp32 or bf16 matrices with an fp32 result in place (`gemm`), and of 16-bit ones
with a result in their dtype (`matmul`), which sum in fp32 and round once. For 16-bit matrices the processor must have
instructions for the dtype (avx512_bf16 or avx512_fp16; processors with AMX have both); elsewhere they would be slower
than fp32. nn/cpu_ops.py has operations on fp32 tensors.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_char, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import paddle

from erniekit.utils import runtime

_FLAGS = {paddle.bfloat16: "avx512_bf16", paddle.float16: "avx512_fp16", paddle.float32: "avx2"}
# Numbers of oneDNN's C interface (dnnl_types.h).
BFLOAT16 = 2
_DATA_TYPES = {paddle.float16: 1, paddle.bfloat16: BFLOAT16, paddle.float32: 3}
_CPU, _IN_ORDER = 1, 1
SOURCE, SECOND_SOURCE, WEIGHTS, RESULT = 1, 2, 33, 17
_BEHIND = 32768  # times the number of an operation behind, from 1 on; together with SECOND_SOURCE
_SWISH = 0x2C
_Dims = c_int64 * 12


class _Argument(ctypes.Structure):
    _fields_ = [("kind", c_int), ("memory", c_void_p)]


class Layout(NamedTuple):
    """How numbers lie in memory: sizes and strides of each axis, in numbers, and their type (3 is fp32)."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    data_type: int = _DATA_TYPES[paddle.float32]


def dense(*sizes: int) -> Layout:
    """fp32 numbers row by row."""
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return Layout(sizes, tuple(reversed(strides)))


@lru_cache(maxsize=8)
def is_available(dtype: paddle.dtype) -> bool:
    """Whether this process can compute with a dtype on its CPU."""
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
    threads = threading.get_ident(), runtime.threads_in_use()
    product = _product(*threads, _DATA_TYPES[x.dtype], rows, inner, columns, transpose_x, transpose_y)
    product.run(x.data_ptr(), y.data_ptr(), out.data_ptr())
    return out


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
    """out [rows, columns] = alpha x y + beta out with `inner` terms a sum, in fp32, of matrices given as (address,
    numbers from one stored row to the next). A transposed one is stored by columns. `factors`: the dtype of x and y,
    float32, or bfloat16 if this process `multiplies_bf16`.
    """
    library = _library()
    assert library is not None
    function = library.sgemm if factors == paddle.float32 else library.gemm_of_bf16
    assert function is not None
    how = b"T" if transpose_x else b"N", b"T" if transpose_y else b"N"
    status = function(*how, rows, columns, inner, alpha, *x, *y, beta, *out)
    assert status == 0, f"oneDNN: product of {factors} matrices: status {status}"


def multiplies_bf16() -> bool:
    """Whether `gemm` multiplies bf16 matrices, faster than fp32 ones."""
    library = _library()
    return is_available(paddle.bfloat16) and library is not None and library.gemm_of_bf16 is not None


def _shape(matrix: paddle.Tensor, transposed: bool) -> tuple[int, int]:
    rows, columns = matrix.shape
    return (columns, rows) if transposed else (rows, columns)


class _Library:
    """oneDNN with an engine and a stream of this process, which live as long as it does."""

    def __init__(self, file: Path) -> None:
        functions = ctypes.CDLL(str(file))
        self._functions = functions
        self.set_address, self.execute = functions.dnnl_memory_set_data_handle, functions.dnnl_primitive_execute
        self.wait, self.sgemm = functions.dnnl_stream_wait, functions.dnnl_sgemm
        matrix: list[Any] = [c_void_p, c_int64]
        sizes: list[Any] = [c_char, c_char, c_int64, c_int64, c_int64]
        self.set_address.argtypes, self.wait.argtypes = [c_void_p, c_void_p], [c_void_p]
        self.sgemm.argtypes = [*sizes, c_float, *matrix, *matrix, c_float, *matrix]
        # The library exports it without a declaration in its headers.
        self.gemm_of_bf16: Callable[..., int] | None = None
        try:
            functions.dnnl_gemm_bf16bf16f32.argtypes = self.sgemm.argtypes
            self.gemm_of_bf16 = functions.dnnl_gemm_bf16bf16f32
        except AttributeError:
            pass
        self.engine, self.stream = c_void_p(), c_void_p()
        self.call("dnnl_engine_create", byref(self.engine), c_int(_CPU), ctypes.c_size_t(0))
        self.call("dnnl_stream_create", byref(self.stream), self.engine, c_int(_IN_ORDER))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status."""
        status = self._functions[name](*arguments)
        assert status == 0, f"oneDNN: {name}: status {status}"

    def describe(self, layout: Layout) -> c_void_p:
        """A memory descriptor, which the caller destroys."""
        description = c_void_p()
        sizes, strides = _Dims(*layout.sizes), _Dims(*layout.strides)
        count, data_type = c_int(len(layout.sizes)), c_int(layout.data_type)
        self.call("dnnl_memory_desc_create_with_strides", byref(description), count, sizes, data_type, strides)
        return description


@lru_cache(maxsize=1)
def _library() -> _Library | None:
    """The wheel's library; None if there is none that can be used."""
    for file in sorted((Path(paddle.__file__).parent / "libs").glob("libdnnl.so*")):
        try:
            return _Library(file)
        except (OSError, AttributeError, AssertionError):
            continue
    return None


class Primitive:
    """An operation on memory of given layouts, compiled by oneDNN for this processor. For one thread: it keeps the
    addresses of a call.

    Args:
        name: the operation, as in oneDNN's `dnnl_NAME_primitive_desc_create`.
        arguments: those of that function behind the engine and before the attributes; the layout of an operand stands
            for its memory descriptor.
        operands: kind (DNNL_ARG_...) and layout of each memory that `run` gets.
        forward: for a backward operation, the one whose adjoint it is.
        behind: operations on the result, in this order: a swish of it (None), or an algorithm with one more operand of
            a layout, which follows the others in `run`.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[Any],
        operands: Sequence[tuple[int, Layout]],
        forward: "Primitive | None" = None,
        behind: Sequence[tuple[int, Layout] | None] = (),
    ) -> None:
        library = _library()
        assert library is not None
        self._library, self._primitive, self._memories = library, c_void_p(), []
        self._described = c_void_p()
        numbered = [(number, each[1]) for number, each in enumerate(behind, 1) if each is not None]
        operands = [*operands, *((_BEHIND * number | SECOND_SOURCE, layout) for number, layout in numbered)]
        descriptions = {layout: library.describe(layout) for layout in {layout for _, layout in operands}}
        given = [descriptions[each] if isinstance(each, Layout) else each for each in arguments]
        given += [] if forward is None else [forward._described]
        create = f"dnnl_{name}_primitive_desc_create"
        attributes = _attributes(library, behind, descriptions)
        if name == "reorder":  # each layout with the engine whose memory it describes
            given = [given[0], library.engine, given[1], library.engine]
        else:
            given = [library.engine, *given]
        library.call(create, byref(self._described), *given, attributes)
        library.call("dnnl_primitive_attr_destroy", attributes)
        library.call("dnnl_primitive_create", byref(self._primitive), self._described)
        for _, layout in operands:
            memory = c_void_p()
            library.call("dnnl_memory_create", byref(memory), descriptions[layout], library.engine, c_void_p())
            self._memories.append(memory)
        for description in descriptions.values():
            library.call("dnnl_memory_desc_destroy", description)
        kinds = zip((kind for kind, _ in operands), self._memories, strict=True)
        self._arguments = (_Argument * len(operands))(*(_Argument(kind, memory) for kind, memory in kinds))

    def run(self, *addresses: int) -> None:
        """Compute with the operands at these addresses."""
        library = self._library
        for memory, address in zip(self._memories, addresses, strict=True):
            library.set_address(memory, address)
        status = library.execute(self._primitive, library.stream, c_int(len(addresses)), self._arguments)
        assert status == 0, f"oneDNN: dnnl_primitive_execute: status {status}"
        library.wait(library.stream)

    def __del__(self) -> None:
        for memory in self._memories:
            self._library.call("dnnl_memory_destroy", memory)
        if self._primitive:
            self._library.call("dnnl_primitive_destroy", self._primitive)
        if self._described:
            self._library.call("dnnl_primitive_desc_destroy", self._described)


def _attributes(
    library: _Library, behind: Sequence[tuple[int, Layout] | None], descriptions: dict[Layout, c_void_p]
) -> c_void_p:
    """See Primitive's `behind`."""
    attributes, operations = c_void_p(), c_void_p()
    library.call("dnnl_primitive_attr_create", byref(attributes))
    library.call("dnnl_post_ops_create", byref(operations))
    for each in behind:
        if each is None:
            library.call("dnnl_post_ops_append_eltwise", operations, c_int(_SWISH), c_float(1.0), c_float(0.0))
        else:
            library.call("dnnl_post_ops_append_binary", operations, c_int(each[0]), descriptions[each[1]])
    library.call("dnnl_primitive_attr_set_post_ops", attributes, operations)
    library.call("dnnl_post_ops_destroy", operations)
    return attributes


@lru_cache(maxsize=512)
def _product(
    thread: int,
    num_threads: int,
    data_type: int,
    rows: int,
    inner: int,
    columns: int,
    transpose_x: bool,
    transpose_y: bool,
) -> Primitive:
    """The product of two matrices, divided over the threads that there are when it is made; a transposed one is stored
    by columns.
    """

    def layout(rows: int, columns: int, transposed: bool) -> Layout:
        return Layout((rows, columns), (1, rows) if transposed else (columns, 1), data_type)

    x, y, out = layout(rows, inner, transpose_x), layout(inner, columns, transpose_y), layout(rows, columns, False)
    return Primitive("matmul", (x, y, None, out), ((SOURCE, x), (WEIGHTS, y), (RESULT, out)))
