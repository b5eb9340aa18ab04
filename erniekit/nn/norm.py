"""Root-mean-square normalisation of the decoder, and layer normalisation of the vision transformer."""

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn import cpu_norm, cpu_ops, decoding, fused
from erniekit.nn.cpu_ops import add_scaled_rows_, scale_rows_and_columns
from erniekit.nn.narrow import rounded
from erniekit.nn.nodes import call
from erniekit.nn.roles import DeclaresRoles, Role


class _RMSNorm(PyLayer):
    """y = x * (r w^T), r = 1/rms of each token, for the CPU: Paddle's sums over an axis are slow there, so sums are
    products with a vector where oneDNN does not compute them. Keeps x and the mean of its squares.
    """

    @staticmethod
    def forward(ctx, x_TD: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        x, weight = x_TD.astype("float32"), weight_D.astype("float32")
        ctx.save_for_backward(x_TD, weight_D)
        ctx.epsilon = epsilon
        if cpu_ops.applies(x):
            y, ctx.mean_square = cpu_norm.rms_norm_forward(x, weight, epsilon)
            return y.astype(x_TD.dtype)
        ctx.mean_square = paddle.matmul(x.square(), paddle.full([x.shape[1], 1], 1.0 / x.shape[1]))
        return scale_rows_and_columns(x, paddle.rsqrt(ctx.mean_square + epsilon), weight).astype(x_TD.dtype)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        x_TD, weight_D = ctx.saved_tensor()
        x, dy, weight = (each.astype("float32") for each in (x_TD, dy_TD.contiguous(), weight_D))
        if isinstance(ctx.mean_square, np.ndarray):
            dx, dweight = cpu_norm.rms_norm_backward(dy, x, ctx.mean_square, weight, ctx.epsilon)
        else:
            rstd_T1, product = paddle.rsqrt(ctx.mean_square + ctx.epsilon), dy * x
            dweight = paddle.matmul(rstd_T1, product, transpose_x=True).reshape([-1])
            # dx = r (w * dy) - x r^3 (sum_j w_j dy_j x_j) / D
            dot_T1 = paddle.matmul(product, weight.unsqueeze(-1))
            pull_T1 = dot_T1.multiply_(rstd_T1 * rstd_T1 * rstd_T1).scale_(-1.0 / x.shape[1])
            dx = add_scaled_rows_(scale_rows_and_columns(dy, rstd_T1, weight), x, pull_T1)
        return (
            None if x_TD.stop_gradient else dx.astype(x_TD.dtype),
            None if weight_D.stop_gradient else dweight.astype(weight_D.dtype),
        )


def _outer(column_T1: paddle.Tensor, row_D: paddle.Tensor) -> paddle.Tensor:
    """[T, 1], [D] -> [T, D] fp32."""
    return paddle.matmul(column_T1, row_D.astype("float32").unsqueeze(0))


def _plain(x: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """The formula as it stands, for a GPU whose fused kernel lacks the element type."""
    wide = x.astype("float32")
    rstd = paddle.rsqrt(wide.square().mean(axis=-1, keepdim=True) + epsilon)
    return (wide * rstd).astype(x.dtype) * weight_D


def rms_norm(x: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last axis; statistics in fp32, result in x's dtype (Zhang &
    Sennrich 2019, arXiv 1910.07467, eq. 4).
    """
    if weight_D.dtype == x.dtype and fused.applies(fused.RMS_NORM, x):
        return fused.rms_norm(x, weight_D, epsilon)
    if not x.place.is_cpu_place():
        return _plain(x, weight_D, epsilon)
    rows = x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])
    if decoding.is_running() and cpu_ops.applies(rows) and weight_D.dtype == x.dtype:
        normed = cpu_norm.rms_norm(rows, weight_D, epsilon)
    else:
        normed = call(_RMSNorm, rows, weight_D, epsilon)
    return normed if x.ndim == 2 else normed.reshape(x.shape)


class RMSNorm(DeclaresRoles):
    """RMSNorm with a learnt gain [size]."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.NORM}

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.epsilon)


class _LayerNorm(PyLayer):
    """Layer normalisation on a CPU, where Paddle's own backward pass takes 20 times as long as the forward pass. Keeps
    x, and mean and variance of each token where oneDNN computes it; else see _RMSNorm.
    """

    @staticmethod
    def forward(
        ctx, x_TD: paddle.Tensor, weight_D: paddle.Tensor, bias_D: paddle.Tensor, epsilon: float
    ) -> paddle.Tensor:
        ctx.save_for_backward(x_TD, weight_D)
        ctx.epsilon, ctx.statistics = epsilon, None
        ctx.bias_needs_gradient = not bias_D.stop_gradient
        if cpu_ops.applies(x_TD):
            y_TD, ctx.statistics = cpu_norm.layer_norm(x_TD, weight_D, bias_D, epsilon)
            return y_TD
        return nn.functional.layer_norm(x_TD, x_TD.shape[1], weight_D, bias_D, epsilon)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        x_TD, weight_D = ctx.saved_tensor()
        if ctx.statistics is not None:
            grads = cpu_norm.layer_norm_backward(dy_TD.contiguous(), x_TD, ctx.statistics, weight_D, ctx.epsilon)
            needed = not x_TD.stop_gradient, not weight_D.stop_gradient, ctx.bias_needs_gradient
            return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))
        size, ones_D = x_TD.shape[1], paddle.ones_like(weight_D)
        average_D1 = paddle.full([size, 1], 1.0 / size)
        centred = x_TD - _outer(paddle.matmul(x_TD, average_D1), ones_D)
        rstd_T1 = paddle.rsqrt(paddle.matmul(centred.square(), average_D1).scale_(1.0, bias=ctx.epsilon))
        product = dy_TD * centred
        dx = dweight = dbias = None
        if not weight_D.stop_gradient:
            dweight = paddle.matmul(rstd_T1, product, transpose_x=True).reshape([-1])
        if ctx.bias_needs_gradient:
            dbias = paddle.matmul(paddle.ones_like(rstd_T1), dy_TD, transpose_x=True).reshape([-1])
        if not x_TD.stop_gradient:
            # With c = x - mean(x): dx = r (w * dy - sum_j w_j dy_j / D) - c r^3 (sum_j w_j dy_j c_j) / D
            average_D1 = weight_D.unsqueeze(-1) / size
            shift_T1 = paddle.matmul(dy_TD, average_D1).multiply_(rstd_T1)
            pull_T1 = paddle.matmul(product, average_D1).multiply_(rstd_T1 * rstd_T1 * rstd_T1)
            dx = _outer(rstd_T1, weight_D).multiply_(dy_TD).subtract_(_outer(shift_T1, ones_D))
            dx = dx.subtract_(centred.multiply_(_outer(pull_T1, ones_D)))
        return dx, dweight, dbias


def layer_norm(x: paddle.Tensor, weight_D: paddle.Tensor, bias_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """weight * (x - mean(x)) / sqrt(var(x) + epsilon) + bias over the last axis; in fp32, result in x's dtype (Ba et
    al. 2016, arXiv 1607.06450).
    """
    size = x.shape[-1]
    if not x.place.is_cpu_place():
        return nn.functional.layer_norm(x, size, weight_D, bias_D, epsilon)
    rows = x.reshape([-1, size])
    return rounded(lambda *wide: _LayerNorm.apply(*wide, epsilon), rows, weight_D, bias_D).reshape(x.shape)


class LayerNorm(DeclaresRoles):
    """Layer normalisation with a learnt gain and bias [size]."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([size], is_bias=True)

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.NORM, "bias": Role.BIAS}

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size]."""
        return layer_norm(x, self.weight, self.bias, self.epsilon)
