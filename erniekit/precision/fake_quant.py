"""The product of a projection in quantisation-aware training: both operands are rounded to the codes of a scheme on
the way forward, and gradients pass straight through the rounding (Bengio et al. 2013, arXiv 1308.3432).

    y = q(x) q(W),    dx = mask(x) * (dy q(W)^T),    dW = q(x)^T dy

q gives the values that codes and scales stand for (precision/fake_rounding.py), and mask is 0 where q clips. Scales of
weights follow from the weights themselves, again in each pass, by the rule by which an export quantises them, so that
nothing has to be kept. No weight is beyond the range of its tile by more than the rounding of the scale, so that none
has a mask: the largest ones would stop moving. With a rotation H (precision/hadamard.py) x H and H W / n are rounded
instead, and the gradients are rotated back.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn.grouped import row_spans
from erniekit.nn.narrow import matmul
from erniekit.nn.product import Product
from erniekit.nn.roles import Role
from erniekit.nn.shard import ShardSpec
from erniekit.precision import fp8_tensor
from erniekit.precision.codes import CodeSpec
from erniekit.precision.fake_rounding import (
    Grid,
    codes_of,
    decoded,
    divided,
    is_inside,
    largest_of,
    scales_for,
    scales_of,
)
from erniekit.precision.fp8_tensor import Tile
from erniekit.precision.rotation import rotated_columns, rotated_rows

_WHOLE = Tile(None, None)


@dataclass(frozen=True)
class MovingRange:
    """How the range of static activations moves, one update for each optimizer step: the mean of the first
    `online_steps` steps, which multiply by the range of their present inputs; then r = (1 - rate) r + rate * present.
    """

    online_steps: int
    rate: float


@dataclass(frozen=True)
class InputCodes:
    """How the inputs of a product are rounded: `grid` of rows [R, in]. `moving`: all inputs of the product share a
    scale that moves slowly in training and is fixed in use; None: scales follow from the present inputs.
    """

    grid: Grid
    moving: MovingRange | None = None


@dataclass(frozen=True)
class Rotation:
    """A rotation by Hadamard blocks of order n. `normalised`: inputs and weights are both divided by sqrt(n), instead
    of weights alone by n; as the engines' kernels do it, which decides what is rounded.
    """

    order: int
    normalised: bool = False

    def of_weight(self, weight: paddle.Tensor) -> paddle.Tensor:
        """H W / n, or H W / sqrt(n), of [E, in, out]: fp32. The same bits as numpy gives (precision/hadamard.py)."""
        by = math.sqrt(self.order) if self.normalised else float(self.order)
        return divided(rotated_rows(weight, self.order), paddle.full([], by, dtype="float32"))

    def of_inputs(self, rows: paddle.Tensor) -> paddle.Tensor:
        """x H, or x H / sqrt(n), of [R, in]: fp32."""
        turned = rotated_columns(rows, self.order)
        return turned / math.sqrt(self.order) if self.normalised else turned

    def back(self, values: paddle.Tensor) -> paddle.Tensor:
        """The weights [E, in, out] that rotated weights stand for: H W', or H W' / sqrt(n)."""
        return self.of_weight(values) if self.normalised else rotated_rows(values, self.order)


@dataclass(frozen=True)
class Recipe:
    """How one projection is fake-quantised. `weight`: of each matrix [out, in]. `inputs`: None leaves them as they are.
    `rotation`: None: no rotation. `rounds_input_grad`, `rounds_weight_grad`: the gradient of the result is rounded to
    E5M2, one scale for all of it, in the product that gives dx or dW.
    """

    weight: CodeSpec
    inputs: InputCodes | None = None
    rotation: Rotation | None = None
    rounds_input_grad: bool = False
    rounds_weight_grad: bool = False


class FakeQuant(Product):
    """See nn/product.py. `widths`: outputs of each fused part of the projection, which blocks of weights do not cross.

    A moving range is state: `range` [E or 1] fp32, the largest magnitude of (rotated) inputs, and `updates` [E or 1],
    the number of steps in which there were some.
    """

    quantises_adapted = True

    def __init__(self, recipe: Recipe, name: str, widths: Sequence[int] = (), num_experts: int | None = None) -> None:
        super().__init__()
        self.recipe, self.name, self.widths = recipe, name, tuple(widths)
        self.over_ranks: Callable[[paddle.Tensor], paddle.Tensor] | None = None
        self._is_stack = num_experts is not None
        if self.moving is not None:
            self.register_buffer("range", paddle.zeros([num_experts or 1], dtype="float32"))
            self.register_buffer("updates", paddle.zeros([num_experts or 1], dtype="float32"))
            # In a list, so that Paddle does not register it as a buffer.
            self._present = [paddle.zeros([num_experts or 1], dtype="float32")]

    @property
    def moving(self) -> MovingRange | None:
        """How the range of the inputs moves; None if it is not kept."""
        return None if self.recipe.inputs is None else self.recipe.inputs.moving

    @property
    def present(self) -> paddle.Tensor:
        """[E or 1] fp32: the largest magnitude of the inputs since the last update of the range; 0 without any."""
        return self._present[0]

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {} if self.moving is None else {"range": Role.QUANTIZER, "updates": Role.QUANTIZER}

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable: the range of a stack's inputs is one number for each expert."""
        if self.moving is None or not self._is_stack:
            return {}
        return {"range": ShardSpec(0, over="experts"), "updates": ShardSpec(0, over="experts")}

    def forward(self, x: paddle.Tensor, weight: paddle.Tensor | None, counts: list[int] | None = None) -> paddle.Tensor:
        """See Product."""
        assert weight is not None
        if counts is not None:
            return _FakeQuantMatmul.apply(x, weight, self, counts)
        *lead, width = x.shape
        rows = x.reshape([-1, width])
        y = _FakeQuantMatmul.apply(rows, weight.unsqueeze(0), self, [rows.shape[0]])
        return y.reshape([*lead, weight.shape[-1]])

    # Weights

    def weight_codes(
        self, weight: paddle.Tensor, scales: list[paddle.Tensor] | None = None
    ) -> tuple[list[paddle.Tensor], list[paddle.Tensor]]:
        """The numbers of the codes and the scales of matrices [E, in, out], part by part along the outputs; a part is
        one whose blocks begin at its first output. `scales`: those of an earlier call for the same weight.
        """
        wide = weight.detach().astype("float32")
        if self.recipe.rotation is not None:
            wide = self.recipe.rotation.of_weight(wide)
        pieces = paddle.split(wide, list(self._widths), axis=-1) if len(self._widths) > 1 else [wide]
        grid = self._weight_grid
        if scales is None:
            scales = [scales_of(piece, grid, self.over_ranks) for piece in pieces]
        return [codes_of(piece, each, grid) for piece, each in zip(pieces, scales, strict=True)], scales

    def weight_values(
        self, weight: paddle.Tensor, scales: list[paddle.Tensor] | None = None
    ) -> tuple[paddle.Tensor, list[paddle.Tensor]]:
        """q(W), fp32 [E, in, out], and the scales."""
        codes, scales = self.weight_codes(weight, scales)
        values = [decoded(each, scale, self._weight_grid) for each, scale in zip(codes, scales, strict=True)]
        return values[0] if len(values) == 1 else paddle.concat(values, axis=-1), scales

    @property
    def _widths(self) -> tuple[int, ...]:
        return self.widths if self.recipe.weight.block is not None else ()

    @property
    def _weight_grid(self) -> Grid:
        """The grid of matrices [in, out]; a CodeSpec describes [out, in]."""
        spec = self.recipe.weight
        assert spec.kind != "convolutional", "no scheme of training has 2-bit codes"
        tile = Tile(spec.group, 1)
        if spec.whole:
            tile = _WHOLE
        elif spec.block is not None:
            tile = Tile(spec.block[1], spec.block[0])
        return Grid(spec.kind, spec.lowest, spec.largest, tile, spec.scale_type)

    def dense(self, weight: paddle.Tensor | None) -> np.ndarray:
        """See Product. Of a rotated weight: H q(H W / n)."""
        assert weight is not None
        values, _ = self.weight_values(weight.reshape([-1, *weight.shape[-2:]]))
        if self.recipe.rotation is not None:
            values = self.recipe.rotation.back(values)
        return values.reshape(weight.shape).numpy()

    def quantized_tensors(self, weight: paddle.Tensor | None) -> list[dict[str, paddle.Tensor]]:
        """See Product: `codes` [out, in] (int8, or float8_e4m3fn), `scales` [tiles of out, tiles of in] fp32, of the
        rotated matrix where there is a rotation; with a moving range also `range` [1].
        """
        assert weight is not None
        codes, scales = self.weight_codes(weight.reshape([-1, *weight.shape[-2:]]))
        dtype = "int8" if self.recipe.weight.kind == "int" else "float8_e4m3fn"
        joined = (paddle.concat(each, axis=-1) if len(each) > 1 else each[0] for each in (codes, scales))
        all_codes, all_scales = (each.transpose([0, 2, 1]) for each in joined)
        found = []
        for number in range(len(all_codes)):
            tensors = {"codes": all_codes[number].astype(dtype), "scales": all_scales[number]}
            if self.moving is not None:
                tensors["range"] = self.range[number : number + 1]
            found.append(tensors)
        return found

    # Inputs

    def input_values(self, rows: paddle.Tensor, counts: Sequence[int]) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """q(x) of rows [R, in] sorted by matrix, in their dtype, and the mask [R, in] uint8; None: nothing is
        clipped.
        """
        inputs, rotation = self.recipe.inputs, self.recipe.rotation
        if inputs is None:
            return (rows if rotation is None else rotation.of_inputs(rows).astype(rows.dtype)), None
        wide = rows.astype("float32") if rotation is None else rotation.of_inputs(rows)
        if inputs.moving is None:
            scales = scales_of(wide, inputs.grid)
            return decoded(codes_of(wide, scales, inputs.grid), scales, inputs.grid).astype(rows.dtype), None
        values, masks = [], []
        for number, begin, end in row_spans(counts):
            span = wide[begin:end]
            scales = self._static_scales(span, number, inputs)
            values.append(decoded(codes_of(span, scales, inputs.grid), scales, inputs.grid))
            masks.append(is_inside(span, scales, inputs.grid))
        return paddle.concat(values).astype(rows.dtype), paddle.concat(masks)

    @paddle.no_grad()
    def _static_scales(self, span: paddle.Tensor, number: int, inputs: InputCodes) -> paddle.Tensor:
        """The scale [1, 1] of the inputs of matrix `number`; in training their range is noted for the next update."""
        assert inputs.moving is not None
        present, updates = largest_of(span, _WHOLE), self.updates[number]
        if self.training:
            # The largest one is the same however often activation checkpointing computes a pass again.
            noted = self._present[0]
            noted[number] = paddle.maximum(noted[number], present[0, 0])
            is_online = updates < float(max(inputs.moving.online_steps, 1))
        else:
            is_online = updates == 0.0
        return scales_for(paddle.where(is_online, present, self.range[number]), inputs.grid)

    @paddle.no_grad()
    def update_range(self, present: paddle.Tensor) -> None:
        """Move the range once, at the end of a step; `present` [E or 1] is the largest magnitude over all ranks, 0
        where there was no input.
        """
        moving = self.moving
        assert moving is not None
        updates = self.updates + (present > 0).astype("float32")
        mean = self.range + (present - self.range) / updates.clip(min=1.0)
        moved = self.range * (1.0 - moving.rate) + present * moving.rate
        new = paddle.where(updates <= float(max(moving.online_steps, 1)), mean, moved)
        self.range.set_value(paddle.where(present > 0, new, self.range))
        self.updates.set_value(updates)
        self.forget_present()

    def forget_present(self) -> None:
        """Drop what was noted since the last update."""
        self._present = [paddle.zeros_like(self.present)]


class _FakeQuantMatmul(PyLayer):
    """Sorted rows [R, in] times the matrices [E, in, out] of their experts."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: paddle.Tensor, product: FakeQuant, counts: list[int]):
        ctx.product, ctx.counts = product, counts
        ctx.needs_rows, ctx.dtype = not rows.stop_gradient, rows.dtype
        # Ranks that share scales compute them together, also those that have no rows.
        values, ctx.scales = product.weight_values(weight)
        if rows.shape[0] == 0:
            ctx.save_for_backward(weight)
            return paddle.zeros([0, weight.shape[-1]], dtype=rows.dtype)
        x, mask = product.input_values(rows, counts)
        ctx.save_for_backward(weight, x, *([] if mask is None else [mask]))
        return _times(x, values.astype(x.dtype), counts)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        weight, *kept = ctx.saved_tensor()
        product, counts = ctx.product, ctx.counts
        recipe = product.recipe
        if not kept:
            dweight = None if weight.stop_gradient else paddle.zeros(weight.shape, dtype=weight.dtype)
            return paddle.zeros([0, weight.shape[-2]], dtype=dy.dtype), dweight
        drows = dweight = None
        rounded = _in_e5m2(dy) if recipe.rounds_input_grad or recipe.rounds_weight_grad else dy
        if ctx.needs_rows:
            values, _ = product.weight_values(weight, ctx.scales)
            upper = rounded if recipe.rounds_input_grad else dy
            drows = _times(upper, values.astype(dy.dtype), counts, transposed=True)
            if len(kept) == 2:
                drows = drows.astype("float32") * kept[1].astype("float32")
            if recipe.rotation is not None:
                drows = recipe.rotation.of_inputs(drows)  # H is symmetric
            drows = drows.astype(ctx.dtype)
        if not weight.stop_gradient:
            dweight = _weight_gradient(kept[0], rounded if recipe.rounds_weight_grad else dy, weight.shape, counts)
            if recipe.rotation is not None:
                dweight = recipe.rotation.of_weight(dweight)
            dweight = dweight.astype(weight.dtype)
        return drows, dweight


def _times(
    rows: paddle.Tensor, values: paddle.Tensor, counts: Sequence[int], transposed: bool = False
) -> paddle.Tensor:
    """Each matrix's rows times it, or times its transpose."""
    spans = row_spans(counts)
    parts = [matmul(rows[begin:end], values[number], transpose_y=transposed) for number, begin, end in spans]
    return parts[0] if len(parts) == 1 else paddle.concat(parts)


def _weight_gradient(x: paddle.Tensor, dy: paddle.Tensor, shape: Sequence[int], counts: Sequence[int]) -> paddle.Tensor:
    """x^T dy of each matrix's rows: [E, in, out], zeros for one without rows."""
    parts = [paddle.zeros(shape[1:], dtype=dy.dtype)] * len(counts)
    for number, begin, end in row_spans(counts):
        parts[number] = matmul(x[begin:end], dy[begin:end], transpose_x=True)
    return paddle.stack(parts)


def _in_e5m2(dy: paddle.Tensor) -> paddle.Tensor:
    return fp8_tensor.quantise(dy, _WHOLE, "e5m2", pow2=False).dequantised().astype(dy.dtype)
