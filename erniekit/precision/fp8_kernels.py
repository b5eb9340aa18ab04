"""Matrix products in FP8 by Paddle's kernels for Hopper GPUs (compute capability 9.0), one for each expert.

It was written after Paddle's interface and has not run on such a GPU; the arithmetic that is expected of the kernels is
that of fp8_emulated. Each expert's rows are filled with zeros to a multiple of 128, as the product that sums over rows
needs; zeros change no scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import paddle
from paddle.incubate.nn import functional as kernels

from erniekit.nn.grouped import row_spans
from erniekit.precision.fp8_counts import Fp8Counts, Kind
from erniekit.precision.fp8_emulated import Emulated, Recipe
from erniekit.precision.fp8_tensor import Quantised

BLOCK = 128
_CAPABILITY = (9, 0)
_CUDA = (12, 8)


def missing(recipe: Recipe, device: str, compute_type: str) -> str:
    """Why this device does not multiply by the recipe, between tensors of the compute_type; empty if it does."""
    if not device.startswith("gpu"):
        return f"{device} has no products in FP8: these need an NVIDIA GPU of compute capability 9.0"
    reason = refused(recipe, tuple(paddle.device.cuda.get_device_capability()), compute_type)
    cuda = paddle.version.cuda()
    if not reason and tuple(int(part) for part in cuda.split(".")[:2]) < _CUDA:
        reason = f"Paddle was built with CUDA {cuda}, and its products in FP8 need 12.8"
    return reason


def refused(recipe: Recipe, capability: tuple[int, ...], compute_type: str) -> str:
    """Why the kernels do not multiply by the recipe on a GPU of this compute capability; empty if they do."""
    if capability != _CAPABILITY:
        found = ".".join(map(str, capability))
        return f"this GPU has compute capability {found}, and Paddle's kernels for FP8 need 9.0 (H100, H800, H200, H20)"
    if recipe.scaling != "blockwise":
        return "Paddle's kernels have blocks only (fp8: blockwise)"
    if recipe.gradients != "e4m3":
        return "Paddle's kernels quantise to E4M3 only (fp8_gradients: e4m3)"
    if compute_type == "fp16":
        return "Paddle's kernels take and give bf16, not fp16 (compute_type: bf16)"
    return ""


@dataclass(frozen=True)
class PaddleKernels:
    """See Backend (fp8_product.py). Codes and scales of rows are filled up; their scales are [rows, columns / 128]."""

    recipe: Recipe
    counts: Fp8Counts = field(default_factory=Fp8Counts)
    name = "Paddle's kernels"

    def refuses(self, in_features: int, out_features: int) -> str:
        """See Backend."""
        if in_features % BLOCK or out_features % BLOCK:
            return f"[{in_features}, {out_features}]: Paddle's kernels need multiples of {BLOCK}"
        return ""

    def rows(self, x: paddle.Tensor, counts: Sequence[int], kind: Kind = "activations") -> Quantised:
        """See Backend."""
        padded = filled(x, counts)
        codes, scales = kernels.fp8_quant_blockwise(
            padded, output_scale_transpose=False, using_pow2_scale=self.recipe.pow2, quant_method="1x128"
        )
        quantised = Quantised(codes, scales, self.recipe.rows())
        self.counts.add(kind, padded, quantised)
        return quantised

    def weight(self, weight: paddle.Tensor, sums_over_rows: bool = True) -> Quantised:
        """See Backend."""
        return Emulated(self.recipe, self.counts).weight(weight, sums_over_rows)

    def times(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        return self._multiply(rows, weight, counts, dtype, turned=True)

    def times_transposed(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        return self._multiply(rows, weight, counts, dtype, turned=False)

    def _multiply(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype, turned: bool
    ) -> paddle.Tensor:
        """x W (`turned`) or x W^T of each expert. The kernel multiplies by a transposed matrix, so that it is W itself
        that has to be turned first.
        """
        parts = []
        for expert, codes, scales, count in _by_expert(rows, counts):
            matrix, matrix_scales = kernels.fp8_quant_blockwise(
                weight[expert],
                input_transpose=turned,
                output_scale_transpose=False,
                return_transpose_only=turned,
                using_pow2_scale=self.recipe.pow2,
                quant_method="128x128",
            )
            parts.append(_product(codes, _turned(scales), matrix, _by_four(matrix_scales), dtype, False)[:count])
        return paddle.concat(parts)

    def weight_gradient(
        self, x: Quantised | paddle.Tensor, dy: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        of_x, of_dy = self._columns(x, counts), self._columns(dy, counts)
        parts = [paddle.zeros([of_x[0][0].shape[0], dy.shape[1]], dtype=dtype)] * len(counts)
        for (expert, _, _), (x_codes, x_scales), (dy_codes, dy_scales) in zip(
            row_spans(counts), of_x, of_dy, strict=True
        ):
            parts[expert] = _product(x_codes, x_scales, dy_codes, dy_scales, paddle.float32, True).astype(dtype)
        return paddle.stack(parts)

    def _columns(
        self, x: Quantised | paddle.Tensor, counts: Sequence[int]
    ) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
        """x^T of each expert that has rows, quantised along the rows: codes [n, rows] and scales [rows / 128, n]."""
        tokens = [_up(count) for count in counts if count]
        values, scales = (x.codes, x.scales) if isinstance(x, Quantised) else (filled(x, counts), None)
        codes, made = kernels.fused_transpose_split_quant(values, scales, tokens, pow_2_scales=self.recipe.pow2)
        return list(zip(codes, made, strict=True))

    def gated(self, gate_up: paddle.Tensor, weights_R1: paddle.Tensor | None = None) -> paddle.Tensor:
        """See Backend."""
        return Emulated(self.recipe).gated(gate_up, weights_R1)

    def gated_backward(
        self, gate_up: paddle.Tensor, dhidden: paddle.Tensor, weights_R1: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor]:
        """See Backend."""
        if weights_R1 is None:
            return Emulated(self.recipe).gated_backward(gate_up, dhidden)
        return kernels.fused_swiglu_weighted_bwd(gate_up, dhidden, weights_R1)


def _product(a, a_scales, b, b_scales, dtype: paddle.dtype, b_is_rows: bool) -> paddle.Tensor:
    """a [M, K] b [N, K]^T. Scales of a [K / 128, M]; of b the same, or for blocks as `_by_four` gives them."""
    return kernels.fp8_gemm_blockwise(a, a_scales, b, b_scales, dtype, is_a_1d_scaled=True, is_b_1d_scaled=b_is_rows)


def _up(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def filled(rows: paddle.Tensor, counts: Sequence[int]) -> paddle.Tensor:
    """Rows sorted by expert with zeros behind those of each, so that every expert has a multiple of 128."""
    parts = []
    for _, begin, end in row_spans(counts):
        parts.append(rows[begin:end])
        if extra := _up(end - begin) - (end - begin):
            parts.append(paddle.zeros([extra, rows.shape[1]], dtype=rows.dtype))
    return parts[0] if len(parts) == 1 else paddle.concat(parts)


def _by_expert(rows: Quantised, counts: Sequence[int]) -> list[tuple[int, paddle.Tensor, paddle.Tensor, int]]:
    """(expert, its filled codes, their scales, its rows) of each expert that has rows."""
    spans, begin = [], 0
    for expert, count in enumerate(counts):
        if count:
            end = begin + _up(count)
            spans.append((expert, rows.codes[begin:end], rows.scales[begin:end], count))
            begin = end
    return spans


def _turned(scales: paddle.Tensor) -> paddle.Tensor:
    """Scales of rows as the product takes them: [rows, K / 128] -> [K / 128, rows]."""
    return scales.transpose([1, 0]).contiguous()


def _by_four(scales: paddle.Tensor) -> paddle.Tensor:
    """Scales of blocks [N / 128, K / 128] as the product takes them: it hands their address to cuBLAS, which expects
    the next row behind a multiple of four scales.
    """
    missing = -scales.shape[1] % 4
    if not missing:
        return scales
    return paddle.concat([scales, paddle.zeros([scales.shape[0], missing], dtype=scales.dtype)], axis=1)
