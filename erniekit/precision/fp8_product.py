"""The product of a projection in FP8, forward and backward: y = x W, dx = dy W^T and dW = x^T dy, each from operands in
FP8 with sums in fp32. The projection keeps its weight, and the optimizer its fp32 master copy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn.product import Product
from erniekit.precision.fp8_counts import Fp8Counts, Kind
from erniekit.precision.fp8_emulated import Recipe
from erniekit.precision.fp8_tensor import Quantised


class Backend(Protocol):
    """Products in FP8 of R rows, sorted by expert, with the experts' weights [E, in, out]. `counts` are the rows of
    each expert, which sum to R > 0. Results have the dtype `dtype`.
    """

    @property
    def recipe(self) -> Recipe:
        """How tensors are quantised."""
        ...

    @property
    def counts(self) -> Fp8Counts:
        """What is counted of the codes."""
        ...

    @property
    def name(self) -> str:
        """What computes, for the log."""
        ...

    def refuses(self, in_features: int, out_features: int) -> str:
        """Why a matrix of these sizes cannot be multiplied; empty if it can."""
        ...

    def rows(self, x: paddle.Tensor, counts: Sequence[int], kind: Kind = "activations") -> Quantised:
        """Rows [R, n] in FP8, for products that sum over columns; gradients have the recipe's format for these."""
        ...

    def weight(self, weight: paddle.Tensor, sums_over_rows: bool = True) -> Quantised:
        """Weights [..., in, out] in FP8, for products that sum over rows or columns."""
        ...

    def times(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """x W: [R, in] -> [R, out]."""
        ...

    def times_transposed(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """dy W^T: [R, out] -> [R, in]."""
        ...

    def weight_gradient(
        self, x: Quantised | paddle.Tensor, dy: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """x^T dy of each expert: [R, in], [R, out] -> [E, in, out], zeros for an expert without rows. Both operands are
        quantised along the rows; an x that comes in FP8 is quantised a second time.
        """
        ...

    def gated(self, gate_up: paddle.Tensor, weights_R1: paddle.Tensor | None = None) -> paddle.Tensor:
        """weights * silu(gate) * up for gate_up [R, 2F] = gate | up, computed in fp32: [R, F] in the dtype of gate_up.
        weights [R, 1] fp32; None: 1.
        """
        ...

    def gated_backward(
        self, gate_up: paddle.Tensor, dhidden: paddle.Tensor, weights_R1: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor]:
        """The gradients of gate_up [R, 2F] and of the weights [R, 1] (None without), and the result [R, F] again."""
        ...


class Fp8Product(Product):
    """See nn/product.py. `stores_fp8`: what is kept for the gradient of the weight is the input in FP8."""

    def __init__(self, backend: Backend, name: str, stores_fp8: bool = True) -> None:
        super().__init__()
        self.backend, self.name, self.stores_fp8 = backend, name, stores_fp8

    def forward(self, x: paddle.Tensor, weight: paddle.Tensor | None, counts: list[int] | None = None) -> paddle.Tensor:
        """See Product."""
        assert weight is not None
        if counts is not None:
            return _Fp8Matmul.apply(x, weight, self, counts)
        *lead, width = x.shape
        rows = x.reshape([-1, width])
        y = _Fp8Matmul.apply(rows, weight.unsqueeze(0), self, [rows.shape[0]])
        return y.reshape([*lead, weight.shape[-1]])

    def dense(self, weight: paddle.Tensor | None) -> np.ndarray:
        """See Product."""
        assert weight is not None
        return self.backend.weight(weight).dequantised().numpy()

    def quantized_tensors(self, weight: paddle.Tensor | None) -> list[dict[str, paddle.Tensor]]:
        """See Product. Codes have the layout of the weight."""
        assert weight is not None
        matrices = [weight] if weight.ndim == 2 else list(weight)
        quantised = [self.backend.weight(matrix) for matrix in matrices]
        return [{"codes": each.codes, "scales": each.scales} for each in quantised]


class _Fp8Matmul(PyLayer):
    """Sorted rows [R, in] times the matrices [E, in, out] of their experts."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: paddle.Tensor, product: Fp8Product, counts: list[int]):
        backend = ctx.backend = product.backend
        ctx.counts, ctx.tile = counts, None
        if rows.shape[0] == 0:
            ctx.save_for_backward(weight, rows)
            return paddle.zeros([0, weight.shape[-1]], dtype=rows.dtype)
        quantised = backend.rows(rows, counts)
        if weight.stop_gradient:  # of a frozen weight only the gradient of the rows is computed
            ctx.save_for_backward(weight)
        elif product.stores_fp8:
            ctx.tile = quantised.tile
            ctx.save_for_backward(weight, quantised.codes, quantised.scales)
        else:
            ctx.save_for_backward(weight, rows)
        ctx.needs_rows, ctx.dtype = not rows.stop_gradient, rows.dtype
        return backend.times(quantised, weight, counts, rows.dtype)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        weight, *kept = ctx.saved_tensor()
        backend, counts = ctx.backend, ctx.counts
        if dy.shape[0] == 0:
            dweight = None if weight.stop_gradient else paddle.zeros(weight.shape, dtype=weight.dtype)
            return paddle.zeros([0, weight.shape[-2]], dtype=dy.dtype), dweight
        drows = dweight = None
        if ctx.needs_rows:
            quantised = backend.rows(dy, counts, "gradients")
            drows = backend.times_transposed(quantised, weight, counts, ctx.dtype)
        if kept:
            x = kept[0] if ctx.tile is None else Quantised(kept[0], kept[1], ctx.tile)
            dweight = backend.weight_gradient(x, dy, counts, weight.dtype)
        return drows, dweight
