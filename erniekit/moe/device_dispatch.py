"""Dispatch and combine by Paddle's fused GPU operators, which sort the pairs on the device: no table is sorted on the
host or uploaded, and the rows of a token are summed in fp32. The plain operations of moe/dispatch.py are the reference.
"""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn import fused


@dataclass
class DeviceAssignment:
    """The (token, expert) pairs of T tokens: `experts` int32 [T, K], -1 for a pair that is left out; `weights` fp32
    [T, K], without gradient; `counts` the number of rows of each expert [E] on the host. `dispatch` finds `row_of`, the
    row of each token and expert [T, E], and `row_weights` [R, 1].
    """

    experts: paddle.Tensor
    weights: paddle.Tensor
    counts: list[int]
    row_of: paddle.Tensor | None = None
    row_weights: paddle.Tensor | None = None

    def permute(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """Each token's copies, sorted by expert: [T, D] -> [R, D]."""
        rows, self.row_of, self.row_weights = fused.permute(x_TD, self.experts, self.weights, self.counts)
        return rows

    def unpermute(self, rows: paddle.Tensor) -> paddle.Tensor:
        """The sum of each token's rows: [R, D] -> [T, D]."""
        assert self.row_of is not None and self.row_weights is not None, "dispatch comes first"
        return fused.unpermute(rows, self.row_of, self.experts, self.row_weights)

    def weigh(self, rows: paddle.Tensor) -> paddle.Tensor:
        """Each row times its weight."""
        assert self.row_weights is not None, "dispatch comes first"
        return rows * self.row_weights.astype(rows.dtype)

    def by_pair(self, values_R1: paddle.Tensor) -> paddle.Tensor:
        """A number of each row as [T, K]; 0 for a pair that is left out."""
        assert self.row_of is not None, "dispatch comes first"
        rows_TK = paddle.take_along_axis(self.row_of.astype("int64"), self.experts.clip(0).astype("int64"), axis=1)
        # The rows of pairs that are left out are those of other pairs, or -1.
        taken = paddle.gather(values_R1.reshape([-1]), rows_TK.clip(0).reshape([-1])).reshape(rows_TK.shape)
        return taken * (self.experts >= 0).astype(taken.dtype)


def applies(x_TD: paddle.Tensor, num_pairs: int, num_experts: int, top_k: int) -> bool:
    """Whether the fused operators can dispatch these tokens. Of no pairs they return what was in memory before."""
    return num_pairs > 0 and fused.permute_applies(x_TD, num_experts, top_k)


def assign(
    experts_TK: paddle.Tensor,
    weights_TK: paddle.Tensor,
    on_host_TK: np.ndarray,
    num_experts: int,
    keep_TK: np.ndarray | None = None,
) -> DeviceAssignment:
    """The pairs of a router's choice, on the device and on the host; pairs where `keep` is False are left out."""
    experts = experts_TK.detach().astype("int32")
    kept = on_host_TK.reshape(-1)
    if keep_TK is not None:
        experts = paddle.where(paddle.to_tensor(keep_TK), experts, paddle.full_like(experts, -1))
        kept = kept[keep_TK.reshape(-1)]
    counts = np.bincount(kept, minlength=num_experts).tolist()
    return DeviceAssignment(experts, weights_TK.detach(), counts)


class _Dispatch(PyLayer):
    """Copy each token to its K rows; the adjoint sums the K rows."""

    @staticmethod
    def forward(ctx, x_TD: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
        ctx.assignment = assignment
        return assignment.permute(x_TD)

    @staticmethod
    def backward(ctx, drows: paddle.Tensor) -> paddle.Tensor:
        return ctx.assignment.unpermute(drows)


class _Combine(PyLayer):
    """Weighted sum of each token's K rows; dw is the product of a row with its token's gradient."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weights_TK: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
        ctx.save_for_backward(rows)
        ctx.assignment = assignment
        ctx.needs_gradient = not rows.stop_gradient, not weights_TK.stop_gradient
        return assignment.unpermute(assignment.weigh(rows))

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        (rows,) = ctx.saved_tensor()
        assignment: DeviceAssignment = ctx.assignment
        rows_need_gradient, weights_need_gradient = ctx.needs_gradient
        copied, dweights = assignment.permute(dy_TD), None
        if weights_need_gradient:
            dots = (copied.astype("float32") * rows.astype("float32")).sum(axis=-1, keepdim=True)
            dweights = assignment.by_pair(dots)
        return assignment.weigh(copied) if rows_need_gradient else None, dweights


class _RowWeights(PyLayer):
    """The weight of each row; the adjoint puts a row's gradient back to its pair."""

    @staticmethod
    def forward(ctx, weights_TK: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
        ctx.assignment = assignment
        assert assignment.row_weights is not None, "dispatch comes first"
        return assignment.row_weights.clone()

    @staticmethod
    def backward(ctx, dweights_R1: paddle.Tensor) -> paddle.Tensor:
        return ctx.assignment.by_pair(dweights_R1)


class _SumRows(PyLayer):
    """The sum of each token's K rows; the adjoint copies the token's gradient to them."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
        ctx.assignment = assignment
        return assignment.unpermute(rows)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> paddle.Tensor:
        return ctx.assignment.permute(dy_TD)


def dispatch(x_TD: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
    """[T, D] -> rows sorted by expert [R, D]."""
    return _Dispatch.apply(x_TD, assignment)


def combine(rows: paddle.Tensor, weights_TK: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
    """Weighted sum of each token's rows: [R, D], [T, K] fp32 -> [T, D]. A pair that is left out contributes nothing."""
    return _Combine.apply(rows, weights_TK, assignment)


def row_weights(weights_TK: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
    """The routing weight of each sorted row: [T, K] fp32 -> [R, 1] fp32."""
    return _RowWeights.apply(weights_TK, assignment)


def sum_rows(rows: paddle.Tensor, assignment: DeviceAssignment) -> paddle.Tensor:
    """Plain sum of each token's rows, which the experts have weighed: [R, D] -> [T, D]."""
    return _SumRows.apply(rows, assignment)
