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
from paddle.nn.quant import weight_only_linear

from erniekit.nn import fused
from erniekit.nn.grouped import row_spans
from erniekit.nn.linear import Projection
from erniekit.nn.product import Product
from erniekit.precision.codes import choose_scales, encode, symmetric
from erniekit.precision.packing import kernel_order, pack_for_kernels
from erniekit.precision.weight_only import INT4, NF4, Scheme, Schemes, dequantise, quantise
from erniekit.utils.arrays import transposed

# Weights that are dequantised at a time: 8 MB in fp32, against which a product's start-up costs nothing.
_BLOCK = 1 << 21
# Compute capabilities on which Paddle's weight-only kernel takes bf16, groups of inputs, and the layout of `packing`.
_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))


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
    """The same, with codes and bf16 scales in the layout of Paddle's weight-only GPU kernel, which multiplies by them
    in the forward pass. It was written after Paddle's sources and has never run on a GPU.

    Paddle's own operators for the codes are not used: on a GPU, `weight_quantize` leaves the scales of groups unset,
    and `weight_dequantize` takes the number of groups for that of channels.
    """

    @staticmethod
    def fits(in_features: int, out_features: int, scheme: Scheme) -> bool:
        """Whether the kernel accepts such a matrix on this device. Its tiles are 64 by 64."""
        if not paddle.get_device().startswith("gpu") or scheme is NF4 or in_features % 64 or out_features % 64:
            return False
        return fused.compute_capability() in (None, *_CAPABILITIES)

    def fill(self, weight: np.ndarray) -> None:
        """See Matrix."""
        spec = symmetric(self.scheme.bits, self.scheme.group)
        packed, scales = [], []
        for begin in range(0, self.out_features, rows := self._rows()):
            channels = transposed(weight[:, begin : begin + rows].astype(np.float32, copy=False))
            scales.append(choose_scales(channels, spec))
            packed.append(pack_for_kernels(encode(channels, scales[-1], spec), spec.bits))
        self.codes = paddle.to_tensor(np.concatenate(packed))
        by_group = paddle.to_tensor(np.concatenate(scales).T.copy()).astype("bfloat16")
        self.scales = by_group[0] if self.scheme.group is None else by_group  # [out], or [groups, out]

    def times(self, x: paddle.Tensor) -> paddle.Tensor:
        """See Matrix."""
        if not fused.are_enabled():
            return super().times(x)
        major, minor = fused.compute_capability() or _CAPABILITIES[0]
        return weight_only_linear(
            x,
            self.codes,
            weight_scale=self.scales,
            weight_dtype=f"int{self.scheme.bits}",
            arch=10 * major + minor,
            group_size=self.scheme.group or -1,
        )

    def dense(self) -> np.ndarray:
        """See Matrix."""
        return transposed(np.concatenate([block.numpy() for _, _, block in self._blocks(paddle.float32)]))

    def _rows(self) -> int:
        return max(16, _BLOCK // self.in_features // 16 * 16)

    def _blocks(self, dtype: paddle.dtype) -> Iterator[tuple[int, int, paddle.Tensor]]:
        """See Matrix."""
        num_in, bits, rows = self.in_features, self.scheme.bits, self._rows()
        by_group = self.scales.reshape([-1, self.out_features]).astype("float32")
        for begin in range(0, self.out_features, rows):
            end = min(begin + rows, self.out_features)
            levels = _kernel_levels(self.codes[begin * bits // 8 : end * bits // 8], bits)
            groups = levels.reshape([end - begin, by_group.shape[0], -1])
            block = groups * by_group[:, begin:end].transpose([1, 0]).unsqueeze(-1)
            yield begin, end, block.reshape([end - begin, num_in]).astype(dtype)


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
        """See Product. The layout is that of weight_only, or that of Paddle's kernel."""
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


def _halves(codes: paddle.Tensor, scheme: Scheme) -> paddle.Tensor:
    """uint8, two 4-bit codes a byte -> [2 * bytes] fp32: the levels of the scheme, low halves first."""
    return paddle.gather(_pairs(scheme, paddle.get_device()), codes.reshape([-1]).astype("int32")).reshape([-1])


def _dequantised(codes: paddle.Tensor, scales: paddle.Tensor, scheme: Scheme, num_in: int) -> paddle.Tensor:
    """codes [out, width], scales [out, groups] -> [out, in] fp32; the formula of weight_only.dequantise."""
    num_out = codes.shape[0]
    if scheme.bits == 8:
        values = codes.astype("float32")
    else:
        values = _halves(codes, scheme).reshape([num_out, -1])[:, :num_in]
    group, groups = scheme.group or num_in, scales.shape[1]
    if groups * group == num_in:
        return values.reshape([num_out, groups, group]).multiply_(scales.unsqueeze(-1)).reshape([num_out, num_in])
    return values * scales.repeat_interleave(group, axis=1)[:, :num_in]


@lru_cache(maxsize=4)
def _order(bits: int, device: str) -> paddle.Tensor:
    return paddle.to_tensor(kernel_order(bits))


def _kernel_levels(codes: paddle.Tensor, bits: int) -> paddle.Tensor:
    """Codes in the layout of packing.pack_for_kernels, int8 [out * bits / 8, in] -> the whole numbers that they stand
    for, fp32 [out, in].
    """
    num_in, woven = codes.shape[1], 16 // bits
    stored = codes.view("uint8")
    levels = stored.astype("float32") - 128 if bits == 8 else _halves(stored, INT4)
    tiles = levels.reshape([-1, woven * 64]).index_select(_order(bits, paddle.get_device()), axis=1)
    return tiles.reshape([-1, num_in // 64, woven, 64]).transpose([0, 2, 1, 3]).reshape([-1, num_in])
