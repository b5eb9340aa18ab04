"""RMSNorm and layer normalisation by oneDNN, on a CPU in all threads of this process: parts of the autograd nodes of
nn/norm.py, which record no gradient. x is an fp32 tensor to which cpu_ops `applies`, T tokens of D numbers.
"""

import math
from ctypes import c_float, c_int, c_uint
from functools import lru_cache
from threading import get_ident

import numpy as np
import paddle
from paddle.incubate.nn import functional as incubate

from erniekit.nn.cpu_ops import (
    ADD,
    MAX_IN_ONE_THREAD,
    MULTIPLY,
    RESULT_GRADIENT,
    SOURCE_GRADIENT,
    TRAINING,
    memory_of,
    scaled_rows,
    unfilled_like,
)
from erniekit.nn.onednn import RESULT, SECOND_SOURCE, SOURCE, Primitive, dense
from erniekit.utils import runtime

# Numbers of oneDNN's C interface (dnnl_types.h).
_BACKWARD, _WITH_SCALE_AND_SHIFT = c_int(128), c_uint(6)
_MEAN, _VARIANCE, _SCALE, _SHIFT = 49, 50, 51, 52
_SCALE_GRADIENT, _SHIFT_GRADIENT = 255, 256


def rms_norm_forward(x_TD: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> tuple[paddle.Tensor, np.ndarray]:
    """weight * x / sqrt(m + epsilon) with the mean m of the squares of each row, and m [T]."""
    num_tokens, size = x_TD.shape
    rows, out = memory_of(x_TD), unfilled_like(x_TD)
    mean_square_T = np.einsum("td,td->t", rows, rows)
    mean_square_T /= np.float32(size)
    scale_T = 1 / np.sqrt(mean_square_T + np.float32(epsilon))
    scaled_rows(get_ident(), num_tokens, size, MULTIPLY).run(
        x_TD.data_ptr(), scale_T.ctypes.data, out.data_ptr(), weight_D.data_ptr()
    )
    return out, mean_square_T


def rms_norm_backward(
    dy_TD: paddle.Tensor, x_TD: paddle.Tensor, mean_square_T: np.ndarray, weight_D: paddle.Tensor, epsilon: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The gradients of x and weight from that of what `rms_norm_forward` gave.

    It is layer normalisation with a mean of zero. Its gradient, r (w dy - mean(w dy) - x r^2 mean(w dy x)) with r = 1 /
    sqrt(mean_square + epsilon), has one term too many, since there the mean follows x; that is added again.
    """
    num_tokens, size = x_TD.shape
    dx, dweight, unused = unfilled_like(x_TD), unfilled_like(weight_D), unfilled_like(weight_D)
    no_mean_T = np.zeros(num_tokens, np.float32)
    _layer_norm_backward(get_ident(), runtime.threads_in_use(), num_tokens, size, epsilon).run(
        *(dx.data_ptr(), dy_TD.data_ptr(), x_TD.data_ptr(), no_mean_T.ctypes.data, mean_square_T.ctypes.data),
        *(weight_D.data_ptr(), weight_D.data_ptr(), dweight.data_ptr(), unused.data_ptr()),
    )
    mean_T = np.einsum("td,d->t", memory_of(dy_TD), memory_of(weight_D) / np.float32(size))
    mean_T /= np.sqrt(mean_square_T + np.float32(epsilon))
    _column_added(get_ident(), num_tokens, size).run(dx.data_ptr(), mean_T.ctypes.data, dx.data_ptr())
    return dx, dweight


@lru_cache(maxsize=256)
def _column_added(thread: int, num_rows: int, size: int) -> Primitive:
    x, column = dense(num_rows, size), dense(num_rows, 1)
    return Primitive("binary", (c_int(ADD), x, column, x), ((SOURCE, x), (SECOND_SOURCE, column), (RESULT, x)))


def rms_norm(x_TD: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last axis, without what a backward pass would need."""
    if runtime.has_avx512():
        return incubate.fused_rms_norm(x_TD, weight_D, None, epsilon, 1)[0]
    # Paddle's operation is compiled for AVX-512 and nothing else.
    if math.prod(x_TD.shape) > MAX_IN_ONE_THREAD:
        return rms_norm_forward(x_TD, weight_D, epsilon)[0]
    rows, out = memory_of(x_TD), unfilled_like(x_TD)
    scale_T = np.einsum("td,td->t", rows, rows)
    scale_T /= np.float32(rows.shape[1])
    scale_T += np.float32(epsilon)
    np.sqrt(scale_T, out=scale_T)
    result = memory_of(out)
    np.divide(rows, scale_T[:, None], out=result)
    result *= memory_of(weight_D)
    return out


def layer_norm(
    x_TD: paddle.Tensor, weight_D: paddle.Tensor, bias_D: paddle.Tensor, epsilon: float
) -> tuple[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
    """weight * (x - mean) / sqrt(variance + epsilon) + bias over the last axis, and mean and variance [T]."""
    num_tokens, size = x_TD.shape
    y, mean, variance = unfilled_like(x_TD), *(paddle.empty([num_tokens], dtype=x_TD.dtype) for _ in range(2))
    operands = (x_TD, y, mean, variance, weight_D, bias_D)
    _layer_norm(get_ident(), num_tokens, size, epsilon).run(*(each.data_ptr() for each in operands))
    return y, (mean, variance)


def layer_norm_backward(
    dy_TD: paddle.Tensor,
    x_TD: paddle.Tensor,
    statistics: tuple[paddle.Tensor, paddle.Tensor],
    weight_D: paddle.Tensor,
    epsilon: float,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """The gradients of x, weight and bias."""
    num_tokens, size = x_TD.shape
    grads = unfilled_like(x_TD), unfilled_like(weight_D), unfilled_like(weight_D)
    # The library asks for the shift, whose value is not used.
    operands = (grads[0], dy_TD, x_TD, *statistics, weight_D, weight_D, *grads[1:])
    _layer_norm_backward(get_ident(), runtime.threads_in_use(), num_tokens, size, epsilon).run(
        *(each.data_ptr() for each in operands)
    )
    return grads


@lru_cache(maxsize=256)
def _layer_norm(thread: int, num_tokens: int, size: int, epsilon: float) -> Primitive:
    x, statistic, weight = dense(num_tokens, size), dense(num_tokens), dense(size)
    arguments = (TRAINING, x, x, statistic, c_float(epsilon), _WITH_SCALE_AND_SHIFT)
    statistics = ((_MEAN, statistic), (_VARIANCE, statistic))
    operands = ((SOURCE, x), (RESULT, x), *statistics, (_SCALE, weight), (_SHIFT, weight))
    return Primitive("layer_normalization_forward", arguments, operands)


@lru_cache(maxsize=256)
def _layer_norm_backward(thread: int, num_threads: int, num_tokens: int, size: int, epsilon: float) -> Primitive:
    """Each of the threads that there are when it is made sums a part of the gradient of the weight."""
    x, statistic, weight = dense(num_tokens, size), dense(num_tokens), dense(size)
    arguments = (_BACKWARD, x, x, x, statistic, c_float(epsilon), _WITH_SCALE_AND_SHIFT)
    statistics = ((_MEAN, statistic), (_VARIANCE, statistic))
    gradients = ((_SCALE_GRADIENT, weight), (_SHIFT_GRADIENT, weight))
    weights = ((_SCALE, weight), (_SHIFT, weight))
    operands = ((SOURCE_GRADIENT, x), (RESULT_GRADIENT, x), (SOURCE, x), *statistics, *weights, *gradients)
    forward = _layer_norm(thread, num_tokens, size, epsilon)
    return Primitive("layer_normalization_backward", arguments, operands, forward=forward)
