"""Operations between the products of a training step, on a CPU in all threads of this process.

Paddle's own take one thread there, and read and write memory several times where oneDNN (nn/onednn.py) does it once.
Each function falls back to Paddle's operations where the library is absent or does not apply; these are the reference.
No function records a gradient: they are parts of autograd nodes. Arguments are fp32; "in place" changes the first one.
"""

import math
from collections.abc import Sequence
from ctypes import c_float, c_int
from functools import lru_cache
from threading import get_ident

import numpy as np
import paddle
from paddle import nn

from erniekit.nn import onednn
from erniekit.nn.factors import factor
from erniekit.nn.gemm import gemm
from erniekit.nn.onednn import RESULT, SECOND_SOURCE, SOURCE, Primitive, dense
from erniekit.utils import runtime

# Numbers of oneDNN's C interface (dnnl_types.h).
TRAINING = c_int(64)
_SOFTMAX, _SWISH, _GELU, _LINEAR = 0x30000, 0x2C, 0x31, 0x26
ADD, MULTIPLY, DIVIDE, SUBTRACT = 0x1FFF0, 0x1FFF1, 0x1FFF4, 0x1FFF5
SOURCE_GRADIENT, RESULT_GRADIENT = 129, 145
_FEW = 4096  # numbers up to which Paddle's swiglu, a loop without vectors, is faster than starting numpy
MAX_IN_ONE_THREAD = 1 << 18  # numbers up to which one thread is faster than several that have to wait for one another


def applies(x: paddle.Tensor) -> bool:
    """Whether oneDNN can compute with x, which must not be empty."""
    return 0 not in x.shape and supports(x)


def supports(x: paddle.Tensor) -> bool:
    """Whether oneDNN can compute with tensors like x; x itself may have no rows."""
    return (
        x.dtype == paddle.float32
        and x.place.is_cpu_place()
        and x.is_contiguous()
        and onednn.is_available(paddle.float32)
    )


def unfilled(shape: Sequence[int], like: paddle.Tensor) -> paddle.Tensor:
    """paddle.empty of the dtype and on the device of a tensor. Paddle's own function checks its arguments for longer
    than a small operation takes, as Tensor.size takes longer than the product of the shape.
    """
    return paddle._C_ops.empty(shape, like.dtype, like.place)


def unfilled_like(x: paddle.Tensor) -> paddle.Tensor:
    """paddle.empty_like; see `unfilled`."""
    return paddle._C_ops.empty_like(x, x.dtype, x.place)


def row_address(matrix: paddle.Tensor, row: int = 0) -> tuple[int, int]:
    """Where a row of a contiguous matrix begins, and the numbers from one row to the next, as gemm takes it."""
    size = matrix.shape[-1]
    return matrix.data_ptr() + matrix.element_size() * row * size, size


def matmul_into(
    out: paddle.Tensor, x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False
) -> None:
    """Write the product of two matrices, to which oneDNN `applies` or which are factors, to `out`: rows of a larger
    tensor, say.
    """
    x, y, inner = factor(x), factor(y), x.shape[0 if transpose_x else 1]
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    matrices = row_address(x), row_address(y), row_address(out)
    gemm(transpose_x, transpose_y, out.shape[0], out.shape[1], inner, *matrices, factors=x.dtype)


def matmul(x: paddle.Tensor, y: paddle.Tensor, transpose_x: bool = False, transpose_y: bool = False) -> paddle.Tensor:
    """The product of two matrices; see matmul_into."""
    rows, columns = x.shape[1 if transpose_x else 0], y.shape[0 if transpose_y else 1]
    out = paddle._C_ops.empty([rows, columns], paddle.float32, x.place)
    matmul_into(out, x, y, transpose_x, transpose_y)
    return out


def softmax(scores: paddle.Tensor) -> paddle.Tensor:
    """Softmax over the last axis. Unlike Paddle's, it takes logits that are more than 64 below the largest for what
    they are.
    """
    if not applies(scores):
        return nn.functional.softmax(scores, axis=-1)
    length, out = scores.shape[-1], unfilled_like(scores)
    _softmax(get_ident(), math.prod(scores.shape) // length, length).run(scores.data_ptr(), out.data_ptr())
    return out


def softmax_(scores: paddle.Tensor) -> paddle.Tensor:
    """`softmax` in place."""
    if not applies(scores):
        return nn.functional.softmax_(scores, axis=-1)
    length, address = scores.shape[-1], scores.data_ptr()
    _softmax(get_ident(), math.prod(scores.shape) // length, length).run(address, address)
    return scores


def softmax_backward_(dp: paddle.Tensor, p: paddle.Tensor) -> paddle.Tensor:
    """The gradient of scores s with p = softmax(s), from that of p and in its place: p (dp - sum_j p_j dp_j)."""
    if not (applies(dp) and applies(p)):
        return dp.subtract_((p * dp).sum(axis=-1, keepdim=True)).multiply_(p)
    rows = -1, p.shape[-1]
    softmax_backward_rows_(memory_of(dp).reshape(rows), memory_of(p).reshape(rows))
    return dp


def take_at(x_TV: paddle.Tensor, columns_T1: paddle.Tensor) -> paddle.Tensor:
    """The number in one column of each row: [T, V], int64 [T, 1] -> [T, 1]. Paddle's own copies all of x on a CPU."""
    if not applies(x_TV):
        return paddle.take_along_axis(x_TV, columns_T1, axis=1)
    return paddle.to_tensor(np.take_along_axis(memory_of(x_TV), columns_T1.numpy(), axis=1))


def add_at_(x_TV: paddle.Tensor, columns_T1: paddle.Tensor, values_T1: paddle.Tensor) -> paddle.Tensor:
    """Add a number to one column of each row, in place. See take_at."""
    if not applies(x_TV):
        return x_TV.put_along_axis_(columns_T1, values_T1, axis=1, reduce="add")
    memory_of(x_TV)[np.arange(len(x_TV)), columns_T1.numpy()[:, 0]] += values_T1.numpy()[:, 0]
    return x_TV


def memory_of(x: paddle.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, while that lives."""
    size = math.prod(x.shape)
    return np.frombuffer((c_float * size).from_address(x.data_ptr()), np.float32).reshape(x.shape)


def softmax_rows_(scores: np.ndarray) -> None:
    """softmax_ of a contiguous array [rows, *], where oneDNN is available."""
    address = scores.__array_interface__["data"][0]
    _softmax(get_ident(), *scores.shape).run(address, address)


def softmax_backward_rows_(dp: np.ndarray, p: np.ndarray) -> None:
    """softmax_backward_ of contiguous arrays [rows, *], where oneDNN is available."""
    dp_at, p_at = (array.__array_interface__["data"][0] for array in (dp, p))
    if runtime.has_avx512():
        _softmax_backward(get_ident(), *p.shape).run(dp_at, dp_at, p_at)
        return
    # The library's own has no vectors here and takes ten times as long.
    means_R = np.einsum("rc,rc->r", p, dp)
    _centred_times(get_ident(), *p.shape).run(dp_at, means_R.ctypes.data, dp_at, p_at)


@lru_cache(maxsize=256)
def _softmax(thread: int, rows: int, length: int) -> Primitive:
    layout = dense(rows, length)
    arguments = (TRAINING, c_int(_SOFTMAX), layout, layout, c_int(1))
    return Primitive("softmax_forward", arguments, ((SOURCE, layout), (RESULT, layout)))


@lru_cache(maxsize=256)
def _softmax_backward(thread: int, rows: int, length: int) -> Primitive:
    layout = dense(rows, length)
    arguments = (c_int(_SOFTMAX), layout, layout, layout, c_int(1))
    operands = ((SOURCE_GRADIENT, layout), (RESULT_GRADIENT, layout), (RESULT, layout))
    return Primitive("softmax_backward", arguments, operands, forward=_softmax(thread, rows, length))


@lru_cache(maxsize=256)
def _centred_times(thread: int, rows: int, length: int) -> Primitive:
    """(x - a number for each row) times y."""
    x, column = dense(rows, length), dense(rows, 1)
    operands = ((SOURCE, x), (SECOND_SOURCE, column), (RESULT, x))
    return Primitive("binary", (c_int(SUBTRACT), x, column, x), operands, behind=((MULTIPLY, x),))


def fast_sigmoid(x: paddle.Tensor, factor: float = 1.0) -> paddle.Tensor:
    """sigmoid(factor * x) = (1 + tanh(factor x / 2)) / 2: tanh is the one such function that Paddle vectorises."""
    return (x * (0.5 * factor)).tanh_().scale_(0.5, bias=0.5)


def swish(x: paddle.Tensor, factor: float = 1.0) -> paddle.Tensor:
    """x * sigmoid(factor * x)."""
    if not applies(x):
        return fast_sigmoid(x, factor).multiply_(x)
    out = unfilled_like(x)
    _activation(get_ident(), _SWISH, math.prod(x.shape), factor).run(x.data_ptr(), out.data_ptr())
    return out


def swish_backward(dy: paddle.Tensor, x: paddle.Tensor, factor: float = 1.0) -> paddle.Tensor:
    """The gradient of x from that of swish(x, factor)."""
    if not (applies(dy) and applies(x)):
        # s + factor x s (1 - s) = s (1 + factor x (1 - s))
        sigmoid = fast_sigmoid(x, factor)
        return sigmoid.scale(-factor, bias=factor).multiply_(x).scale_(1.0, bias=1.0).multiply_(sigmoid).multiply_(dy)
    dx = unfilled_like(x)
    _activation_backward(get_ident(), _SWISH, math.prod(x.shape), factor).run(
        dx.data_ptr(), dy.data_ptr(), x.data_ptr()
    )
    return dx


def swish_times(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x * sigmoid(x) * y for tensors of one shape."""
    if not (applies(x) and applies(y)):
        return swish(x).multiply_(y)
    out = unfilled_like(x)
    zero = _zero()
    _swish_times(get_ident(), math.prod(x.shape)).run(x.data_ptr(), zero.ctypes.data, out.data_ptr(), y.data_ptr())
    return out


@lru_cache(maxsize=1)
def _zero() -> np.ndarray:
    return np.zeros(1, np.float32)


@lru_cache(maxsize=256)
def _swish_times(thread: int, size: int) -> Primitive:
    """(x + 0), its swish, times y: only binary operations may have another behind them."""
    x, zero = dense(size), dense(1)
    operands = ((SOURCE, x), (SECOND_SOURCE, zero), (RESULT, x))
    return Primitive("binary", (c_int(ADD), x, zero, x), operands, behind=(None, (MULTIPLY, x)))


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """x * P(X <= x) for a standard normal X."""
    if not applies(x):
        return nn.functional.gelu(x)
    out = unfilled_like(x)
    _activation(get_ident(), _GELU, math.prod(x.shape), 0.0).run(x.data_ptr(), out.data_ptr())
    return out


def gelu_backward(dy: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """The gradient of x from that of gelu(x)."""
    if not (applies(dy) and applies(x)):
        density = paddle.exp(x.square().scale_(-0.5)).scale_((2.0 * math.pi) ** -0.5)
        return paddle.erf(x * 0.5**0.5).scale_(0.5, bias=0.5).add_(density.multiply_(x)).multiply_(dy)
    dx = unfilled_like(x)
    _activation_backward(get_ident(), _GELU, math.prod(x.shape), 0.0).run(dx.data_ptr(), dy.data_ptr(), x.data_ptr())
    return dx


def multiply(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x * y for tensors of one shape."""
    if not (applies(x) and applies(y)):
        return x * y
    out = unfilled_like(x)
    _elementwise(get_ident(), MULTIPLY, math.prod(x.shape)).run(x.data_ptr(), y.data_ptr(), out.data_ptr())
    return out


def multiply_(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x * y for tensors of one shape, in place."""
    if not (applies(x) and applies(y)):
        return x.multiply_(y)
    _elementwise(get_ident(), MULTIPLY, math.prod(x.shape)).run(x.data_ptr(), y.data_ptr(), x.data_ptr())
    return x


def add_to_each(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x [..., *] + y [*], whose axes are the last ones of x."""
    return x + y if not (applies(x) and applies(y)) else _add_to_each(x, y, unfilled_like(x))


def add_to_each_(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """`add_to_each` in place."""
    return x.add_(y) if not (applies(x) and applies(y)) else _add_to_each(x, y, x)


def _add_to_each(x: paddle.Tensor, y: paddle.Tensor, out: paddle.Tensor) -> paddle.Tensor:
    _broadcast(get_ident(), ADD, math.prod(x.shape) // math.prod(y.shape), math.prod(y.shape)).run(
        x.data_ptr(), y.data_ptr(), out.data_ptr()
    )
    return out


@lru_cache(maxsize=256)
def _broadcast(thread: int, algorithm: int, count: int, size: int) -> Primitive:
    x, y = dense(count, size), dense(1, size)
    return Primitive("binary", (c_int(algorithm), x, y, x), ((SOURCE, x), (SECOND_SOURCE, y), (RESULT, x)))


def add(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x + y for tensors of one shape."""
    if not (applies(x) and applies(y)):
        return x + y
    out = unfilled_like(x)
    _elementwise(get_ident(), ADD, math.prod(x.shape)).run(x.data_ptr(), y.data_ptr(), out.data_ptr())
    return out


def copy(x: paddle.Tensor) -> paddle.Tensor:
    """A tensor of its own with the numbers of x."""
    if not applies(x):
        return x.clone()
    out = unfilled_like(x)
    _activation(get_ident(), _LINEAR, math.prod(x.shape), 1.0).run(x.data_ptr(), out.data_ptr())
    return out


def add_(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x + y for tensors of one shape, in place."""
    if not (applies(x) and applies(y)):
        return x.add_(y)
    _elementwise(get_ident(), ADD, math.prod(x.shape)).run(x.data_ptr(), y.data_ptr(), x.data_ptr())
    return x


def subtract_(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x - y for tensors of one shape, in place."""
    if not (applies(x) and applies(y)):
        return x.subtract_(y)
    _elementwise(get_ident(), SUBTRACT, math.prod(x.shape)).run(x.data_ptr(), y.data_ptr(), x.data_ptr())
    return x


@lru_cache(maxsize=256)
def _activation(thread: int, algorithm: int, size: int, factor: float) -> Primitive:
    layout = dense(size)
    arguments = (TRAINING, c_int(algorithm), layout, layout, c_float(factor), c_float(0.0))
    return Primitive("eltwise_forward", arguments, ((SOURCE, layout), (RESULT, layout)))


@lru_cache(maxsize=256)
def _activation_backward(thread: int, algorithm: int, size: int, factor: float) -> Primitive:
    layout = dense(size)
    arguments = (c_int(algorithm), layout, layout, layout, c_float(factor), c_float(0.0))
    operands = ((SOURCE_GRADIENT, layout), (RESULT_GRADIENT, layout), (SOURCE, layout))
    return Primitive("eltwise_backward", arguments, operands, forward=_activation(thread, algorithm, size, factor))


@lru_cache(maxsize=256)
def _elementwise(thread: int, algorithm: int, size: int) -> Primitive:
    layout = dense(size)
    arguments = (c_int(algorithm), layout, layout, layout)
    return Primitive("binary", arguments, ((SOURCE, layout), (SECOND_SOURCE, layout), (RESULT, layout)))


def scale_rows(x_TD: paddle.Tensor, factors_T1: paddle.Tensor) -> paddle.Tensor:
    """x times a number for each row."""
    if not (applies(x_TD) and applies(factors_T1)):
        return x_TD * factors_T1
    out = unfilled_like(x_TD)
    operands = (x_TD, factors_T1, out)
    scaled_rows(get_ident(), *x_TD.shape, None).run(*(each.data_ptr() for each in operands))
    return out


def scale_rows_and_columns(
    x_TD: paddle.Tensor, of_rows_T1: paddle.Tensor, of_columns_D: paddle.Tensor
) -> paddle.Tensor:
    """x times a number for each row and one for each column."""
    if not (applies(x_TD) and applies(of_rows_T1)):
        # Broadcasting is slow: an outer product gives the factors.
        return paddle.matmul(of_rows_T1, of_columns_D.unsqueeze(0)).multiply_(x_TD)
    out = unfilled_like(x_TD)
    operands = (x_TD, of_rows_T1, out, of_columns_D)
    scaled_rows(get_ident(), *x_TD.shape, MULTIPLY).run(*(each.data_ptr() for each in operands))
    return out


def add_scaled_rows_(y_TD: paddle.Tensor, x_TD: paddle.Tensor, factors_T1: paddle.Tensor) -> paddle.Tensor:
    """y + x times a number for each row, in place of y."""
    if not (applies(y_TD) and applies(x_TD) and applies(factors_T1)):
        ones_1D = paddle.ones([1, x_TD.shape[1]], dtype=x_TD.dtype)
        return y_TD.add_(paddle.matmul(factors_T1, ones_1D).multiply_(x_TD))
    operands = (x_TD, factors_T1, y_TD, y_TD)
    scaled_rows(get_ident(), *x_TD.shape, ADD).run(*(each.data_ptr() for each in operands))
    return y_TD


def standardise_(
    x_TD: paddle.Tensor, divisor_1: paddle.Tensor, mean_D: paddle.Tensor, std_D: paddle.Tensor
) -> paddle.Tensor:
    """(x / divisor - mean) / std, in place; the same bits on every path."""
    if not applies(x_TD):
        return x_TD.divide_(divisor_1).subtract_(mean_D).divide_(std_D)
    operands = (x_TD, divisor_1, x_TD, mean_D, std_D)
    _standardised(get_ident(), *x_TD.shape).run(*(each.data_ptr() for each in operands))
    return x_TD


@lru_cache(maxsize=256)
def _standardised(thread: int, num_rows: int, size: int) -> Primitive:
    x, one, row = dense(num_rows, size), dense(1, 1), dense(1, size)
    operands = ((SOURCE, x), (SECOND_SOURCE, one), (RESULT, x))
    behind = ((SUBTRACT, row), (DIVIDE, row))
    return Primitive("binary", (c_int(DIVIDE), x, one, x), operands, behind=behind)


@lru_cache(maxsize=256)
def scaled_rows(thread: int, num_rows: int, size: int, behind: int | None) -> Primitive:
    """x times [num_rows, 1]; the result times [1, size], or plus [num_rows, size], if so."""
    x, factors = dense(num_rows, size), dense(num_rows, 1)
    operands = ((SOURCE, x), (SECOND_SOURCE, factors), (RESULT, x))
    further = () if behind is None else ((behind, dense(1, size) if behind == MULTIPLY else x),)
    return Primitive("binary", (c_int(MULTIPLY), x, factors, x), operands, behind=further)


def swiglu(gate_up_RW: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up of a few rows gate | up [R, 2F] -> [R, F], in this thread: waking others would take longer."""
    rows, width = gate_up_RW.shape
    if rows * width <= _FEW:
        return nn.functional.swiglu(gate_up_RW)
    out, size = paddle.empty([rows, width // 2], dtype=gate_up_RW.dtype), width // 2
    both: np.ndarray = np.from_dlpack(gate_up_RW)
    result: np.ndarray = np.from_dlpack(out)
    # gate * up / (1 + exp(-gate)); exp overflows to infinity below -88, and the quotient is the zero that it should be.
    with np.errstate(over="ignore"):
        np.exp(np.negative(both[:, :size], out=result), out=result)
    np.add(result, 1, out=result)
    np.divide(both[:, :size], result, out=result)
    np.multiply(both[:, size:], result, out=result)
    return out
