"""Root-mean-square normalisation of the decoder, and layer normalisation of the vision transformer."""

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn.narrow import rounded
from erniekit.nn.roles import DeclaresRoles, Role


class _RMSNorm(PyLayer):
    """y = x * (r w^T), r = 1/rms of each token, for the CPU: broadcasting and summing over an axis are slow there, so
    the factors are one outer product and the sums are products with a vector. Keeps x and r, and nothing of y's size.
    """

    @staticmethod
    def forward(ctx, x_TD: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        x = x_TD.astype("float32")
        mean_square_T1 = paddle.matmul(x.square(), paddle.full([x.shape[1], 1], 1.0 / x.shape[1]))
        rstd_T1 = paddle.rsqrt(mean_square_T1.scale_(1.0, bias=epsilon))
        ctx.save_for_backward(x_TD, rstd_T1, weight_D)
        return _outer(rstd_T1, weight_D).multiply_(x).astype(x_TD.dtype)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        x_TD, rstd_T1, weight_D = ctx.saved_tensor()
        x, dy = x_TD.astype("float32"), dy_TD.astype("float32")
        product = dy * x
        dx = dweight = None
        if not weight_D.stop_gradient:
            dweight = paddle.matmul(rstd_T1, product, transpose_x=True).reshape([-1]).astype(weight_D.dtype)
        if not x_TD.stop_gradient:
            # dx = r (w * dy) - x r^3 (sum_j w_j dy_j x_j) / D
            dot_T1 = paddle.matmul(product, weight_D.astype("float32").unsqueeze(-1))
            pull_T1 = dot_T1.multiply_(rstd_T1 * rstd_T1 * rstd_T1).scale_(-1.0 / x.shape[1])
            dx = _outer(rstd_T1, weight_D).multiply_(dy)
            dx = dx.add_(_outer(pull_T1, paddle.ones_like(weight_D)).multiply_(x)).astype(x_TD.dtype)
        return dx, dweight


def _outer(column_T1: paddle.Tensor, row_D: paddle.Tensor) -> paddle.Tensor:
    """[T, 1], [D] -> [T, D] fp32."""
    return paddle.matmul(column_T1, row_D.astype("float32").unsqueeze(0))


def _plain(x: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """The formula as it stands. On a GPU broadcasting is free, and products in fp32 may be rounded to TF32."""
    wide = x.astype("float32")
    rstd = paddle.rsqrt(wide.square().mean(axis=-1, keepdim=True) + epsilon)
    return (wide * rstd).astype(x.dtype) * weight_D


def rms_norm(x: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last axis; statistics in fp32, result in x's dtype (Zhang &
    Sennrich 2019, arXiv 1910.07467, eq. 4).
    """
    if not x.place.is_cpu_place():
        return _plain(x, weight_D, epsilon)
    rows = x.reshape([-1, x.shape[-1]])
    return _RMSNorm.apply(rows, weight_D, epsilon).reshape(x.shape)


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


class LayerNorm(DeclaresRoles):
    """Layer normalisation over the last axis with a learnt gain and bias [size] (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.size, self.epsilon = size, epsilon
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([size], is_bias=True)

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.NORM, "bias": Role.BIAS}

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., size] -> [..., size]."""
        return rounded(self._plain, x, self.weight, self.bias)

    def _plain(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        return nn.functional.layer_norm(x, self.size, weight, bias, self.epsilon)
