"""Frozen weights in 8 or 4 bits: the products forward and backward, without ever making a whole fp32 matrix.

Codes and scales are neither parameters nor buffers, so that no optimizer, checkpoint or comparison of ranks knows them:
they follow from the base's weights, and each rank quantises its own share. Only the input has a gradient. The backward
pass dequantises again and saves nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.nn.quant import weight_dequantize, weight_only_linear, weight_quantize

from erniekit.nn.grouped import row_spans
from erniekit.nn.linear import Projection
from erniekit.nn.product import Product
from erniekit.precision.weight_only import NF4, Scheme, Schemes, dequantise, quantise

# Weights that are dequantised at a time: 8 MB in fp32, against which a product's start-up costs nothing.
_BLOCK = 1 << 21


class Matrix:
    """W [in, out] as codes and scales (see weight_only), which plain operations dequantise, some output channels at a
    time. It runs on any device.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.codes: paddle.Tensor  # with the scales, set by `fill`
        self.scales: paddle.Tensor

    def fill(self, weight: np.ndarray) -> None:
        """Quantise `weight` [in, out] fp32. Raises ValueError where a value is not finite."""
        assert weight.shape == (self.in_features, self.out_features), (weight.shape, self.in_features)
        codes, scales = quantise(weight, self.scheme)
        self.codes, self.scales = paddle.to_tensor(codes), paddle.to_tensor(scales)

    def times(self, x: paddle.Tensor) -> paddle.Tensor:
        """x W: [R, in] -> [R, out]."""
        parts = [paddle.matmul(x, block, transpose_y=True) for _, _, block in self._blocks(x.dtype)]
        return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=-1)

    def times_transposed(self, dy: paddle.Tensor) -> paddle.Tensor:
        """dy W^T: [R, out] -> [R, in]."""
        total: paddle.Tensor | None = None
        for begin, end, block in self._blocks(dy.dtype):
            part = paddle.matmul(dy[:, begin:end], block)
            total = part if total is None else total.add_(part)
        return total

    def dense(self) -> np.ndarray:
        """The weight that the codes stand for: [in, out] fp32."""
        return dequantise(self.codes.numpy(), self.scales.numpy(), self.scheme, self.in_features)

    def _blocks(self, dtype: paddle.dtype) -> Iterator[tuple[int, int, paddle.Tensor]]:
        """(begin, end, W[:, begin:end]^T [end - begin, in]) for consecutive output channels."""
        rows = max(1, _BLOCK // self.in_features)
        for begin in range(0, self.out_features, rows):
            end = min(begin + rows, self.out_features)
            codes, scales = self.codes[begin:end], self.scales[begin:end]
            yield begin, end, _dequantised(codes, scales, self.scheme, self.in_features).astype(dtype)


class KernelMatrix(Matrix):
    """The same by Paddle's weight-only GPU kernels, in the layout that they choose. The backward pass dequantises the
    whole matrix once, in 16 bits. It was written after Paddle's documentation and has never run.
    """

    @staticmethod
    def fits(in_features: int, out_features: int, scheme: Scheme) -> bool:
        """Whether the kernels accept such a matrix on this device."""
        on_gpu = paddle.get_device().startswith("gpu")
        return on_gpu and scheme is not NF4 and in_features % 64 == 0 and out_features % 16 == 0

    def fill(self, weight: np.ndarray) -> None:
        """See Matrix."""
        if not np.isfinite(weight).all():
            raise ValueError("a weight is not finite")
        whole = paddle.to_tensor(weight).astype("bfloat16")
        self.codes, self.scales = weight_quantize(whole, algo=self._algorithm, group_size=self._group)

    def times(self, x: paddle.Tensor) -> paddle.Tensor:
        """See Matrix."""
        kind = f"int{self.scheme.bits}"
        return weight_only_linear(x, self.codes, weight_scale=self.scales, weight_dtype=kind, group_size=self._group)

    def times_transposed(self, dy: paddle.Tensor) -> paddle.Tensor:
        """See Matrix."""
        return paddle.matmul(dy, self._dequantised().astype(dy.dtype), transpose_y=True)

    def dense(self) -> np.ndarray:
        """See Matrix."""
        return self._dequantised().astype("float32").numpy()

    @property
    def _algorithm(self) -> str:
        return f"weight_only_int{self.scheme.bits}"

    @property
    def _group(self) -> int:
        return self.scheme.group or -1

    def _dequantised(self) -> paddle.Tensor:
        return weight_dequantize(self.codes, self.scales, algo=self._algorithm, group_size=self._group)


class QuantizedWeight(Product):
    """The product with a frozen weight in 8 or 4 bits: one matrix [in, out], or those of E experts, [E, in, out]."""

    holds_weight = True

    def __init__(self, shape: Sequence[int], scheme: Scheme) -> None:
        super().__init__()
        *stacked, num_in, num_out = shape
        self.shape, self.scheme, self.name = tuple(shape), scheme, scheme.name
        kind = KernelMatrix if KernelMatrix.fits(num_in, num_out, scheme) else Matrix
        self.matrices = [kind(num_in, num_out, scheme) for _ in range(stacked[0] if stacked else 1)]

    def fill(self, index: int, values: np.ndarray) -> None:
        """See Product."""
        self.matrices[index].fill(values)

    def forward(
        self, x: paddle.Tensor, weight: paddle.Tensor | None = None, counts: list[int] | None = None
    ) -> paddle.Tensor:
        """See Product. Differentiable in x."""
        assert weight is None, "a quantised weight takes the place of the parameter"
        if counts is not None:
            return _Product.apply(x, self, counts)
        *lead, width = x.shape
        rows = x.reshape([-1, width])
        return _Product.apply(rows, self, [rows.shape[0]]).reshape([*lead, self.shape[-1]])

    def dense(self, weight: paddle.Tensor | None = None) -> np.ndarray:
        """See Product."""
        return np.stack([matrix.dense() for matrix in self.matrices]).reshape(self.shape)

    def quantized_tensors(self, weight: paddle.Tensor | None = None) -> list[dict[str, paddle.Tensor]]:
        """See Product. The layout is that of weight_only, or the one that Paddle's kernels chose."""
        return [{"codes": matrix.codes, "scales": matrix.scales} for matrix in self.matrices]


@dataclass(frozen=True)
class QuantizedWeights:
    """The factory of quantised weights (nn.linear.ProductFactory)."""

    schemes: Schemes

    def __call__(self, projection: Projection) -> QuantizedWeight:
        """The empty quantised weight of a projection."""
        is_stack = projection.num_experts is not None
        return QuantizedWeight(projection.weight_shape, self.schemes.experts if is_stack else self.schemes.projections)


class _Product(PyLayer):
    """Sorted rows times the matrix of their expert; one node for all experts."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: QuantizedWeight, counts: list[int]) -> paddle.Tensor:
        ctx.weight, ctx.counts = weight, counts
        parts = [matrix.times(part) for matrix, part in _by_matrix(weight, rows, counts)]
        return _joined(parts, rows, weight.shape[-1])

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        parts = [matrix.times_transposed(part) for matrix, part in _by_matrix(ctx.weight, dy, ctx.counts)]
        return _joined(parts, dy, ctx.weight.shape[-2])


def _by_matrix(
    weight: QuantizedWeight, rows: paddle.Tensor, counts: list[int]
) -> Iterator[tuple[Matrix, paddle.Tensor]]:
    """(matrix, its rows) where there are any."""
    for index, begin, end in row_spans(counts):
        yield weight.matrices[index], rows if end - begin == rows.shape[0] else rows[begin:end]


def _joined(parts: list[paddle.Tensor], like: paddle.Tensor, width: int) -> paddle.Tensor:
    if not parts:
        return paddle.zeros([0, width], dtype=like.dtype)
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)


@lru_cache(maxsize=8)
def _pairs(scheme: Scheme, device: str) -> paddle.Tensor:
    """[256, 2] fp32: the two levels that a byte of 4-bit codes stands for."""
    levels = np.asarray(scheme.levels, np.float32)
    byte = np.arange(256)
    return paddle.to_tensor(np.stack([levels[byte & 15], levels[byte >> 4]], axis=-1))


def _dequantised(codes: paddle.Tensor, scales: paddle.Tensor, scheme: Scheme, num_in: int) -> paddle.Tensor:
    """codes [out, width], scales [out, groups] -> [out, in] fp32; the formula of weight_only.dequantise."""
    num_out = codes.shape[0]
    if scheme.bits == 8:
        values = codes.astype("float32")
    else:
        values = paddle.gather(_pairs(scheme, paddle.get_device()), codes.reshape([-1]).astype("int32"))
        values = values.reshape([num_out, -1])[:, :num_in]
    group, groups = scheme.group or num_in, scales.shape[1]
    if groups * group == num_in:
        return values.reshape([num_out, groups, group]).multiply_(scales.unsqueeze(-1)).reshape([num_out, num_in])
    return values * scales.repeat_interleave(group, axis=1)[:, :num_in]
