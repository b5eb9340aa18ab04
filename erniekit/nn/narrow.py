"""The model's operations on tensors of any of its dtypes, of which a CPU has kernels for fp32 alone.

A GPU has a kernel of each operation for bfloat16 and float16, which computes in fp32 and rounds its result. Paddle's
CPU lacks most of these, and there the functions below do the same with fp32 kernels: the 16-bit values are widened, and
the result is rounded to the nearest 16-bit value. Tensors, gradients and what waits for the backward pass have 16 bits,
as on a GPU. Products and sums of large fp32 tensors in a CPU's memory are those of nn/gemm.py and nn/cpu_ops.py.
Elsewhere each function is the operation of Paddle that it is named after.
"""

import math
from collections.abc import Callable, Sequence

import paddle
from paddle.autograd import PyLayer

from erniekit.nn import cpu_ops, decoding, factors, onednn
from erniekit.nn.factors import factor
from erniekit.nn.nodes import call

_MANY = 32  # rows of a product of generation from which oneDNN is faster than Paddle's


def is_emulated(x: paddle.Tensor) -> bool:
    """Whether operations on a tensor are computed in fp32 and rounded: those on 16-bit tensors in a CPU's memory."""
    if x.dtype == paddle.float32:  # first, for many small operations of a decoding step ask
        return False
    return x.dtype in (paddle.bfloat16, paddle.float16) and x.place.is_cpu_place()


def rounded(operation: Callable[..., paddle.Tensor], x: paddle.Tensor, *others: paddle.Tensor) -> paddle.Tensor:
    """operation(x, *others), computed in fp32 and rounded to the dtype of x where that is emulated."""
    if not is_emulated(x):
        return operation(x, *others)
    return operation(x.astype("float32"), *(other.astype("float32") for other in others)).astype(x.dtype)


def add(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x + y."""
    if paddle.is_grad_enabled() and x.shape == y.shape and _is_large(x) and cpu_ops.applies(x) and cpu_ops.applies(y):
        return _Add.apply(x, y)
    return rounded(paddle.add, x, y)


class _Add(PyLayer):
    """x + y in all threads of the CPU; Paddle's sum, and its copies of the gradient, take one."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
        ctx.needed = not x.stop_gradient, not y.stop_gradient
        return cpu_ops.add(x, y)

    @staticmethod
    def backward(ctx, dz: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        # Each gets memory of its own, because Paddle sums gradients in place.
        x_needed, y_needed = ctx.needed
        return dz if x_needed else None, (cpu_ops.copy(dz) if x_needed else dz) if y_needed else None


def multiply(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x * y."""
    return rounded(paddle.multiply, x, y)


def gather(x: paddle.Tensor, index: paddle.Tensor) -> paddle.Tensor:
    """Rows of x, whose dtype may be any."""
    return rounded(lambda wide: paddle.gather(wide, index), x)


def concat(tensors: Sequence[paddle.Tensor], axis: int = 0) -> paddle.Tensor:
    """Tensors of one dtype side by side."""
    return rounded(lambda *wide: paddle.concat(list(wide), axis=axis), *tensors)


def matmul(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False) -> paddle.Tensor:
    """x y for x [..., n, k] and y [k, m], each of which may be transposed if it is a matrix."""
    emulated = is_emulated(x)
    if decoding.is_running() and not emulated:  # first, since starting a product takes long beside computing it
        return _decoded(x, y, transpose_x, transpose_y)
    of_matrices = y.ndim == 2 and (x.ndim == 2 or not transpose_x)
    if not emulated and not (of_matrices and _suits(x) and cpu_ops.applies(x) and cpu_ops.applies(y)):
        return paddle.matmul(x, y, transpose_x=transpose_x, transpose_y=transpose_y)
    assert of_matrices, (x.shape, y.shape)
    rows = x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])
    product = call(_Matmul, rows, y, transpose_x, transpose_y)
    return product if x.ndim == 2 else product.reshape([*x.shape[:-1], product.shape[-1]])


class _Matmul(PyLayer):
    """The product of two matrices on a CPU; keeps each of the two if the other needs a gradient."""

    @staticmethod
    def forward(ctx, x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool, transpose_y: bool) -> paddle.Tensor:
        ctx.needed = not x.stop_gradient, not y.stop_gradient
        ctx.product = _rounded_product if is_emulated(x) else cpu_ops.matmul
        ctx.transposed = transpose_x, transpose_y
        x = factor(x)  # of which the backward pass needs no more; y, a weight, is there anyway
        ctx.save_for_backward(*([x] if ctx.needed[1] else []), *([y] if ctx.needed[0] else []))
        return ctx.product(x, y, transpose_x, transpose_y)

    @staticmethod
    def backward(ctx, dz: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        kept, product, (transpose_x, transpose_y) = ctx.saved_tensor(), ctx.product, ctx.transposed
        dz = factor(dz.contiguous())
        dx = dy = None
        if ctx.needed[0]:
            y = kept[-1]
            dx = product(y, dz, transpose_y, True) if transpose_x else product(dz, y, False, not transpose_y)
        if ctx.needed[1]:
            x = kept[0]
            dy = product(dz, x, True, transpose_x) if transpose_y else product(x, dz, not transpose_x, False)
        return dx, dy


def _rounded_product(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool, transpose_y: bool) -> paddle.Tensor:
    """The product of two 16-bit matrices, summed in fp32 and rounded."""
    if x.size and y.size and onednn.is_available(x.dtype):
        return onednn.matmul(x, y, transpose_x, transpose_y)
    return paddle.matmul(x.astype("float32"), y.astype("float32"), transpose_x, transpose_y).astype(x.dtype)


def _decoded(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool, transpose_y: bool) -> paddle.Tensor:
    """The product in a pass of generation. Of many rows it is started faster here, and is up to a third faster."""
    suits = x.shape[0] >= _MANY and x.ndim == 2 and y.dtype == x.dtype and not transpose_x
    if not (suits and cpu_ops.applies(x)):
        return paddle.matmul(x, y, transpose_x, transpose_y)
    return cpu_ops.matmul(x, y, transpose_x, transpose_y)


def _suits(x: paddle.Tensor) -> bool:
    """Whether a product of x is made here: if it is large, or if all are to round their factors."""
    return _is_large(x) or factors.are_rounded()


def _is_large(x: paddle.Tensor) -> bool:
    """Whether making an operation of our own takes little of its time, and several threads help."""
    return math.prod(x.shape) > cpu_ops.MAX_IN_ONE_THREAD
