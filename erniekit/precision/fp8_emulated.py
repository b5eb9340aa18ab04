"""Matrix products in FP8 on any device: codes and scales as on a GPU, multiplied as fp32 numbers.

With power-of-two scales the values that are multiplied are exact, and only the order of the sums differs from a GPU's.
It is also what every other implementation is compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import paddle

from erniekit.nn.grouped import row_spans
from erniekit.precision.fp8_counts import Fp8Counts, Kind
from erniekit.precision.fp8_tensor import Fp8Format, Quantised, Tile, quantise

Scaling = Literal["blockwise", "rowwise", "tensorwise"]

_BLOCK = 128


@dataclass(frozen=True)
class Recipe:
    """How tensors are quantised.

    `scaling`: what shares a scale. "blockwise": 128 values of a row of activations and gradients along the axis that a
    product sums over, and 128 x 128 values of a weight (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3); "rowwise":
    all values along that axis; "tensorwise": all values of a matrix. `gradients`: the format of the gradients of
    results; everything else is E4M3. `pow2`: scales are powers of two.
    """

    scaling: Scaling
    pow2: bool = True
    gradients: Fp8Format = "e4m3"

    def rows(self) -> Tile:
        """The tile of rows whose product sums over columns."""
        return {"blockwise": Tile(1, _BLOCK), "rowwise": Tile(1, None), "tensorwise": Tile(None, None)}[self.scaling]

    def columns(self) -> Tile:
        """The tile of columns whose product sums over rows: for the gradient of a weight."""
        tile = self.rows()
        return Tile(tile.columns, tile.rows)

    def weight(self, sums_over_rows: bool) -> Tile:
        """The tile of a weight. With blocks it does not depend on the axis, so that both products use one copy."""
        if self.scaling == "blockwise":
            return Tile(_BLOCK, _BLOCK)
        return self.columns() if sums_over_rows else self.rows()


@dataclass(frozen=True)
class Emulated:
    """The products of rows that are sorted by expert with the experts' weights [E, in, out]; see `Backend`."""

    recipe: Recipe
    counts: Fp8Counts = field(default_factory=Fp8Counts)
    name = "emulated"

    def refuses(self, in_features: int, out_features: int) -> str:
        """See Backend. Incomplete tiles at the ends are filled with zeros."""
        return ""

    def _quantise(self, x: paddle.Tensor, tile: Tile, kind: Kind) -> Quantised:
        form: Fp8Format = self.recipe.gradients if kind == "gradients" else "e4m3"
        quantised = quantise(x, tile, form, self.recipe.pow2)
        self.counts.add(kind, x, quantised)
        return quantised

    def rows(self, x: paddle.Tensor, counts: Sequence[int], kind: Kind = "activations") -> Quantised:
        """See Backend."""
        return self._quantise(x, self.recipe.rows(), kind)

    def weight(self, weight: paddle.Tensor, sums_over_rows: bool = True) -> Quantised:
        """A weight [..., in, out] in FP8, for a product that sums over its rows or its columns."""
        return self._quantise(weight, self.recipe.weight(sums_over_rows), "weights")

    def times(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        return _grouped(rows.dequantised(), self.weight(weight), counts, transposed=False).astype(dtype)

    def times_transposed(
        self, rows: Quantised, weight: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        return _grouped(rows.dequantised(), self.weight(weight, False), counts, transposed=True).astype(dtype)

    def weight_gradient(
        self, x: Quantised | paddle.Tensor, dy: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype
    ) -> paddle.Tensor:
        """See Backend."""
        tile = self.recipe.columns()
        whole = x.dequantised() if isinstance(x, Quantised) else x.astype("float32")
        parts = [paddle.zeros([whole.shape[1], dy.shape[1]])] * len(counts)
        for expert, begin, end in row_spans(counts):
            of_x = self._quantise(whole[begin:end], tile, "activations")
            of_dy = self._quantise(dy[begin:end], tile, "gradients")
            parts[expert] = paddle.matmul(of_x.dequantised(), of_dy.dequantised(), transpose_x=True)
        return paddle.stack(parts).astype(dtype)

    def gated(self, gate_up: paddle.Tensor, weights_R1: paddle.Tensor | None = None) -> paddle.Tensor:
        """See Backend."""
        gate, up = _halves(gate_up)
        hidden = gate * paddle.nn.functional.sigmoid(gate) * up
        return (hidden if weights_R1 is None else hidden * weights_R1).astype(gate_up.dtype)

    def gated_backward(
        self, gate_up: paddle.Tensor, dhidden: paddle.Tensor, weights_R1: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor | None, paddle.Tensor]:
        """See Backend."""
        (gate, up), dhidden, dtype = _halves(gate_up), dhidden.astype("float32"), gate_up.dtype
        sigmoid = paddle.nn.functional.sigmoid(gate)
        silu = gate * sigmoid
        hidden, dweights = silu * up, None
        if weights_R1 is not None:
            dweights = (dhidden * hidden).sum(axis=-1, keepdim=True)
            hidden, dhidden = hidden * weights_R1, dhidden * weights_R1
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
        return paddle.concat([dgate, dhidden * silu], axis=-1).astype(dtype), dweights, hidden.astype(dtype)


def _halves(gate_up: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    width = gate_up.shape[-1] // 2
    both = gate_up.astype("float32")
    return both[:, :width], both[:, width:]


def _grouped(rows: paddle.Tensor, weight: Quantised, counts: Sequence[int], transposed: bool) -> paddle.Tensor:
    """Each expert's rows times its matrix, or its transposed matrix. Both have fp32 values."""
    values = weight.dequantised()
    parts = [paddle.matmul(rows[begin:end], values[e], transpose_y=transposed) for e, begin, end in row_spans(counts)]
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)
