"""The adapters of projections (LoRA: Hu et al. 2021, arXiv 2106.09685; DoRA: Liu et al. 2024, arXiv
2402.09353).

Each part of a fused projection (q, k, v or gate, up) has an adapter of its own. A part with weight W [in, out] becomes
W + s A B with A [in, r], B [r, out], and W is frozen. The scaling s is alpha / r, or alpha / sqrt(r) with rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn.grouped import row_spans
from erniekit.nn.linear import Linear, Projection
from erniekit.nn.narrow import add, matmul, rounded
from erniekit.nn.roles import Role
from erniekit.nn.shard import Shardable, ShardSpec
from erniekit.utils.errors import UserError

_ROWS = 1024  # rows of a weight that are multiplied at a time


@dataclass(frozen=True)
class Slot:
    """The adapter of one part: its rank and its scaling s."""

    rank: int
    scaling: float


class _LowRank(PyLayer):
    """y + s_i (x A_i) B_i in the columns of each part i, as one product with all A side by side and one with all B."""

    @staticmethod
    def forward(ctx, x, y, spans, scalings, *factors):
        a, b = _joined(factors, spans, scalings, y.shape[1])
        u = matmul(x, a)
        ctx.save_for_backward(x, a, b, u)
        ctx.spans, ctx.scalings = spans, scalings
        ctx.ranks = [factor.shape[1] for factor in factors[: len(spans)]]
        ctx.needs_gradient = not x.stop_gradient, not y.stop_gradient
        ctx.frozen = [factor.stop_gradient for factor in factors]  # such as those of a part that freeze_config names
        return add(matmul(u, b), y)

    @staticmethod
    def backward(ctx, dy):
        x, a, b, u = ctx.saved_tensor()
        du = matmul(dy, b, transpose_y=True)
        dx = matmul(du, a, transpose_y=True) if ctx.needs_gradient[0] else None
        dy_or_none = dy if ctx.needs_gradient[1] else None
        if all(ctx.frozen):
            return dx, dy_or_none, *([None] * len(ctx.frozen))
        # Narrow products are several times faster with the narrow side first.
        da, db = matmul(du, x, transpose_x=True).T, matmul(u, dy, transpose_x=True)
        das, dbs, row = [], [], 0
        for (begin, end), scaling, rank in zip(ctx.spans, ctx.scalings, ctx.ranks, strict=True):
            das.append(da[:, row : row + rank].contiguous())
            dbs.append(db[row : row + rank, begin:end] * scaling)
            row += rank
        gradients = (None if frozen else grad for grad, frozen in zip(das + dbs, ctx.frozen, strict=True))
        return dx, dy_or_none, *gradients


def _joined(
    factors: Sequence[paddle.Tensor], spans: Sequence[tuple[int, int]], scalings: Sequence[float], width: int
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """All A side by side [in, R], and all B on a block diagonal [R, width], scaled; zero where no part is adapted."""
    count = len(spans)
    if count == 1 and spans[0] == (0, width):
        return factors[0], factors[1] * scalings[0]
    blocks = []
    for b, (begin, end), scaling in zip(factors[count:], spans, scalings, strict=True):
        blocks.append(rounded(partial(nn.functional.pad, pad=[0, 0, begin, width - end]), b * scaling))
    return paddle.concat(list(factors[:count]), axis=1), paddle.concat(blocks, axis=0)


class _GroupedLowRank(PyLayer):
    """y + s (rows_e A_e) B_e for the rows of each expert e; experts without rows get zero gradients."""

    @staticmethod
    def forward(ctx, rows, y, counts, scaling, a, b):
        ctx.counts, ctx.scaling = counts, scaling
        ctx.needs_gradient = not rows.stop_gradient, not y.stop_gradient
        ctx.frozen = a.stop_gradient, b.stop_gradient
        narrow, parts = [], []
        for e, begin, end in row_spans(counts):
            narrow.append(matmul(rows[begin:end], a[e]).scale_(scaling))
            parts.append(add(matmul(narrow[-1], b[e]), y[begin:end]))
        ctx.save_for_backward(rows, a, b)
        ctx.narrow = narrow
        return paddle.concat(parts) if parts else y.clone()

    @staticmethod
    def backward(ctx, dy):
        rows, a, b = ctx.saved_tensor()
        drows, das, dbs = (
            [],
            [paddle.zeros(a.shape[1:], a.dtype)] * len(a),
            [paddle.zeros(b.shape[1:], b.dtype)] * len(b),
        )
        for u, (e, begin, end) in zip(ctx.narrow, row_spans(ctx.counts), strict=True):
            part = dy[begin:end]
            du = matmul(part, b[e], transpose_y=True).scale_(ctx.scaling)
            das[e] = matmul(du, rows[begin:end], transpose_x=True).T
            dbs[e] = matmul(u, part, transpose_x=True)
            if ctx.needs_gradient[0]:
                drows.append(matmul(du, a[e], transpose_y=True))
        ctx.narrow = None
        drows_all = None
        if ctx.needs_gradient[0]:
            drows_all = paddle.concat(drows) if drows else paddle.zeros_like(rows)
        da, db = (None if frozen else paddle.stack(all_) for all_, frozen in zip((das, dbs), ctx.frozen, strict=True))
        return drows_all, dy if ctx.needs_gradient[1] else None, da, db


class Adapter(Shardable):
    """The base of all adapters: `slots` by part, a switch (`enabled`), and dropout on the input while training."""

    def __init__(self, slots: dict[str, Slot], dropout: float) -> None:
        super().__init__()
        self.slots, self.dropout, self.enabled = slots, dropout, True

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        kinds = {"A": Role.ADAPTER_A, "B": Role.ADAPTER_B, "magnitude": Role.SCALE}
        return {parameter_name(kind, part): role for kind, role in kinds.items() for part in self.slots}

    def factors(self, part: str) -> tuple[paddle.Tensor, paddle.Tensor]:
        """A and B of a part."""
        return self._parameters[parameter_name("A", part)], self._parameters[parameter_name("B", part)]

    def _add(self, kind: str, part: str, shape: list[int], dtype: paddle.dtype) -> None:
        zero = nn.initializer.Constant(0.0)
        self.add_parameter(
            parameter_name(kind, part), self.create_parameter(shape, dtype=dtype, default_initializer=zero)
        )

    def _dropped(self, x: paddle.Tensor) -> paddle.Tensor:
        if not self.dropout or not self.training:
            return x
        return nn.functional.dropout(x, self.dropout)


def parameter_name(kind: str, part: str) -> str:
    """The name of a parameter inside its adapter: "A_q", or "A" where the projection has no parts."""
    return f"{kind}_{part}" if part else kind


class LinearAdapter(Adapter):
    """The adapters of a Linear, one for each part in `slots` ("" where it has no parts).

    With `dora` a part's columns are rescaled to a trained length: m (W + s A B) / |W + s A B|, the norm of each column
    held constant in the backward pass (section 4.3 of the paper).
    """

    def __init__(
        self,
        linear: Linear,
        slots: dict[str, Slot],
        dropout: float,
        dora: bool,
        dtype: paddle.dtype,
        values: bool = True,
    ) -> None:
        super().__init__(slots, dropout)
        self.split, self.dora = linear.split, dora
        self._linear = [linear]  # in a list, so that Paddle does not register it as a sub-layer
        ends, begin = {}, 0
        for part, width in (linear.parts or {"": linear.out_features}).items():
            ends[part] = (begin, begin + width)
            begin += width
        self.spans = {part: ends[part] for part in slots}
        for part, slot in slots.items():
            width = self.spans[part][1] - self.spans[part][0]
            self._add("A", part, [linear.in_features, slot.rank], dtype)
            self._add("B", part, [slot.rank, width], dtype)
            if dora:
                # Rounded to 16 bits, the magnitude would differ from |W| and change the model before training.
                self._add("magnitude", part, [width], paddle.float32)
        self._squares: paddle.Tensor | None = None
        if dora and values:
            self.reset_magnitude()

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable. They follow the projection's weight: B is sharded by outputs, or A by inputs."""
        if self.split == "row":
            return {parameter_name("A", part): ShardSpec(0) for part in self.slots}
        if self.split is None:
            return {}
        shard_specs = {parameter_name("B", part): ShardSpec(1) for part in self.slots}
        return shard_specs | (
            {parameter_name("magnitude", part): ShardSpec(0) for part in self.slots} if self.dora else {}
        )

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles. The squared lengths of the base's columns go with the magnitude."""
        return super().roles() | {"_squares": Role.SCALE}

    def partial_gradients(self) -> tuple[str, ...]:
        """See Shardable. The factor that is whole: a rank knows only its share of the outputs (column) or of the inputs
        (row).
        """
        if self.split is None:
            return ()
        names = [parameter_name("A" if self.split == "column" else "B", part) for part in self.slots]
        if self.dora and self.split == "row":
            names += [parameter_name("magnitude", part) for part in self.slots]
        return tuple(names)

    def forward(self, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
        """x [..., in], product [..., out] -> adapted product [..., out]."""
        if not self.enabled:
            return y
        shape = y.shape
        if len(shape) != 2:
            x, y = x.reshape([-1, x.shape[-1]]), y.reshape([-1, shape[-1]])
        dropped = self._dropped(x)
        base = self._linear[0].multiply(dropped) if self.dora and dropped is not x else y
        parts = list(self.slots)
        factors = [self.factors(part) for part in parts]
        adapted = _LowRank.apply(
            dropped,
            base,
            [self.spans[part] for part in parts],
            [self.slots[part].scaling for part in parts],
            *(a for a, _ in factors),
            *(b for _, b in factors),
        )
        if self.dora:
            adapted = (adapted.astype("float32") * self._gain(y.shape[-1])).astype(y.dtype)
            if base is not y:
                adapted = add(adapted, y - base)
        return adapted if len(shape) == 2 else adapted.reshape(shape)

    def added(self, weight: paddle.Tensor) -> paddle.Tensor:
        """The projection's weight [in, out] with the adapter in it, W + s A B, summed in fp32 and in the dtype of W;
        differentiable in all of them. Not for DoRA, and without dropout.
        """
        assert not self.dora
        if not self.enabled:
            return weight
        columns, begin = [], 0
        for part, (start, end) in self.spans.items():
            a, b = (factor.astype("float32") for factor in self.factors(part))
            columns += [paddle.zeros([weight.shape[0], start - begin])] if start > begin else []
            columns.append(paddle.matmul(a, b * self.slots[part].scaling))
            begin = end
        columns += [paddle.zeros([weight.shape[0], weight.shape[1] - begin])] if weight.shape[1] > begin else []
        change = columns[0] if len(columns) == 1 else paddle.concat(columns, axis=1)
        return (weight.astype("float32") + change).astype(weight.dtype)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the squared lengths that DoRA keeps, where the model has no weights to measure them."""
        return 4 * self._linear[0].out_features if self.dora and self._squares is None else 0

    def _gain(self, width: int) -> paddle.Tensor:
        """[out] fp32: the trained length of each column divided by its present length; 1 in columns without adapter."""
        norms = self.column_norms()
        pieces, begin = [], 0
        for part, (start, end) in self.spans.items():
            if start > begin:
                pieces.append(paddle.ones([start - begin], dtype=norms[part].dtype))
            pieces.append(self._parameters[parameter_name("magnitude", part)] / norms[part])
            begin = end
        if begin < width:
            pieces.append(paddle.ones([width - begin], dtype=pieces[0].dtype))
        return pieces[0] if len(pieces) == 1 else paddle.concat(pieces)

    @paddle.no_grad()
    def column_norms(self) -> dict[str, paddle.Tensor]:
        """|W + s A B| of each column, by part, in fp32, without forming the sum:
        |w|^2 + 2 s b.(A^T w) + s^2 b.(A^T A) b.
        """
        assert self._squares is not None
        norms = {}
        for part, (begin, end) in self.spans.items():
            factors, s = self.factors(part), self.slots[part].scaling
            a_w = self._linear[0].multiply(factors[0].T)[:, begin:end].astype("float32")
            a, b = (factor.astype("float32") for factor in factors)
            squares = self._squares[begin:end] + (
                b * (2 * s * a_w + s * s * paddle.matmul(paddle.matmul(a.T, a), b))
            ).sum(0)
            norms[part] = squares.clip(min=1e-30).sqrt()
        return norms

    @paddle.no_grad()
    def reset_magnitude(self) -> None:
        """Set m = |W|, its value before training. The weight must already be loaded."""
        linear, total = self._linear[0], None
        dtype = self.factors(next(iter(self.slots)))[0].dtype
        for begin in range(0, linear.in_features, _ROWS):
            rows = paddle.eye(linear.in_features, dtype="float32")[begin : begin + _ROWS].astype(dtype)
            squares = linear.multiply(rows).astype("float32").square().sum(0)
            total = squares if total is None else total + squares
        assert total is not None
        self._squares = total
        for part, (begin, end) in self.spans.items():
            self._parameters[parameter_name("magnitude", part)].set_value(total[begin:end].sqrt())

    @paddle.no_grad()
    def merged(self, base: paddle.Tensor) -> paddle.Tensor:
        """The projection's weight `base` with the adapter in it, fp32 [in, out]."""
        weight = base.astype("float32").clone()
        norms = self.column_norms() if self.dora else {}
        for part, (begin, end) in self.spans.items():
            a, b = (factor.astype("float32") for factor in self.factors(part))
            columns = weight[:, begin:end] + paddle.matmul(a, b * self.slots[part].scaling)
            if self.dora:
                columns = columns * (self._parameters[parameter_name("magnitude", part)] / norms[part]).astype(
                    "float32"
                )
            weight[:, begin:end] = columns
        return weight


class StackedAdapter(Adapter):
    """The adapters of all routed experts of a layer: A [E, in, r], B [E, r, out], one product an expert."""

    def __init__(self, stacked: Projection, slot: Slot, dropout: float, dtype: paddle.dtype) -> None:
        super().__init__({"": slot}, dropout)
        assert stacked.num_experts is not None
        self._add("A", "", [stacked.num_experts, stacked.in_features, slot.rank], dtype)
        self._add("B", "", [stacked.num_experts, slot.rank, stacked.out_features], dtype)

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable. The stack is sharded by whole experts."""
        return {"A": ShardSpec(0, over="experts"), "B": ShardSpec(0, over="experts")}

    def forward(self, rows: paddle.Tensor, counts: list[int], y: paddle.Tensor) -> paddle.Tensor:
        """rows [R, in] sorted by expert, products [R, out] -> adapted products [R, out]."""
        if not self.enabled:
            return y
        return _GroupedLowRank.apply(self._dropped(rows), y, counts, self.slots[""].scaling, *self.factors(""))

    def added(self, weight: paddle.Tensor) -> paddle.Tensor:
        """The stacked weight [E, in, out] with the adapters in it; see LinearAdapter."""
        if not self.enabled:
            return weight
        a, b = (factor.astype("float32") for factor in self.factors(""))
        return (weight.astype("float32") + paddle.matmul(a, b * self.slots[""].scaling)).astype(weight.dtype)

    @paddle.no_grad()
    def merged(self, base: paddle.Tensor) -> paddle.Tensor:
        """The stacked weight `base` with the adapters in it, fp32 [E, in, out]."""
        a, b = (factor.astype("float32") for factor in self.factors(""))
        return base.astype("float32") + paddle.matmul(a, b * self.slots[""].scaling)


def mergeable_weight(layer: Projection, name: str) -> paddle.Tensor:
    """The parameter that an adapter is merged into. Raises UserError if a product holds the weight."""
    if layer.weight is None:
        raise UserError(
            f"{name}: the weight is quantised, and an adapter cannot be merged into it. Export the adapter: it is "
            "merged into the weights as they were published."
        )
    return layer.weight
