"""Dispatch tokens to experts and combine the outputs: rows are sorted by expert, one contiguous span for each."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn.cpu_ops import multiply, scale_rows
from erniekit.nn.narrow import gather, rounded
from erniekit.nn.nodes import call


@dataclass(frozen=True)
class Assignment:
    """R <= T*K (token, expert) pairs sorted by expert; R < T*K where pairs were dropped. `source` [R] is each sorted
    row's token, `rank` (K of them) [T] the sorted row of each token's k-th pair (R for a dropped one), `order` [R] the
    pair t*K + k of each row, `counts` the number of rows of each expert [E] on the host.
    """

    source: paddle.Tensor
    rank: list[paddle.Tensor]
    order: paddle.Tensor
    counts: list[int]
    num_dropped: int = 0


def assign(experts_TK: np.ndarray, num_experts: int, keep_TK: np.ndarray | None = None) -> Assignment:
    """Sort the pairs by expert, tokens in order within an expert (stable, hence deterministic). experts [T, K] int64 on
    the host; pairs where `keep` is False are left out.
    """
    flat = experts_TK.reshape(-1)
    order = np.argsort(flat, kind="stable")
    if keep_TK is not None:
        order = order[keep_TK.reshape(-1)[order]]
    rank = np.full(len(flat), len(order))
    rank[order] = np.arange(len(order))
    num_tokens, top_k = experts_TK.shape
    counts = np.bincount(flat[order], minlength=num_experts).tolist()
    by_choice = rank.reshape(num_tokens, top_k).T.reshape(-1)
    table = paddle.to_tensor(np.concatenate([order, order // top_k, by_choice]))  # one upload for all of them
    rows, source, *ranks = paddle.split(table, [len(order)] * 2 + [num_tokens] * top_k)
    return Assignment(source, ranks, rows, counts, len(flat) - len(order))


def _copy_out(x_TD: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    return gather(x_TD, assignment.source)


def _with_zero_row(rows: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """Append the row that dropped pairs refer to."""
    if not assignment.num_dropped:
        return rows
    return paddle.concat([rows, paddle.zeros([1, rows.shape[-1]], dtype=rows.dtype)])


def _sum_back(rows: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    rows = _with_zero_row(rows, assignment)
    first, *others = assignment.rank
    total = gather(rows, first).astype("float32")
    for rank_T in others:  # sum(axis=1) over [T, K, D] takes several times as long on a CPU
        total = total.add_(gather(rows, rank_T).astype("float32"))
    return total.astype(rows.dtype)


class _Dispatch(PyLayer):
    """Copy each token to its K rows; the adjoint sums the K rows. Both are gathers: neither needs
    atomic additions.
    """

    @staticmethod
    def forward(ctx, x_TD: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
        ctx.assignment = assignment
        return _copy_out(x_TD, assignment)

    @staticmethod
    def backward(ctx, drows: paddle.Tensor) -> paddle.Tensor:
        return _sum_back(drows, ctx.assignment)


class _Combine(PyLayer):
    """Weighted sum of each token's K rows; dw is the product of a row with its token's gradient."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weights_TK: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
        weights_R1 = paddle.gather(weights_TK.reshape([-1]), assignment.order).unsqueeze(-1)
        ctx.save_for_backward(rows, weights_R1)
        ctx.assignment = assignment
        ctx.needs_gradient = not rows.stop_gradient, not weights_TK.stop_gradient
        return _sum_back(rounded(scale_rows, rows, weights_R1.astype(rows.dtype)), assignment)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        rows, weights_R1 = ctx.saved_tensor()
        rows_need_gradient, weights_need_gradient = ctx.needs_gradient
        copied = _copy_out(dy_TD, ctx.assignment)
        dweights_TK = None
        if weights_need_gradient:
            product = multiply(copied.astype("float32"), rows.astype("float32"))
            dweights_TK = _by_pair(paddle.matmul(product, paddle.ones([rows.shape[1], 1])), ctx.assignment)
        weighed = rounded(scale_rows, copied, weights_R1.astype(copied.dtype)) if rows_need_gradient else None
        return weighed, dweights_TK


class _RowWeights(PyLayer):
    """The weight of each row; the adjoint puts a row's gradient back to its pair, and zero to a dropped one."""

    @staticmethod
    def forward(ctx, weights_TK: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
        ctx.assignment = assignment
        return paddle.gather(weights_TK.reshape([-1]), assignment.order).unsqueeze(-1)

    @staticmethod
    def backward(ctx, dweights_R1: paddle.Tensor) -> paddle.Tensor:
        return _by_pair(dweights_R1, ctx.assignment)


class _SumRows(PyLayer):
    """The sum of each token's K rows; the adjoint copies the token's gradient to them."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
        ctx.assignment = assignment
        return _sum_back(rows, assignment)

    @staticmethod
    def backward(ctx, dy_TD: paddle.Tensor) -> paddle.Tensor:
        return _copy_out(dy_TD, ctx.assignment)


def _by_pair(of_rows_R1: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """A number of each row [R, 1] -> of each pair [T, K]; zero where a pair was dropped."""
    padded = _with_zero_row(of_rows_R1, assignment)
    return paddle.concat([paddle.gather(padded, rank_T) for rank_T in assignment.rank], axis=1)


def dispatch(x_TD: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """[T, D] -> rows sorted by expert [R, D]."""
    return call(_Dispatch, x_TD, assignment)


def combine(rows: paddle.Tensor, weights_TK: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """Weighted sum of each token's rows: [R, D], [T, K] fp32 -> [T, D]. A dropped pair contributes nothing."""
    return call(_Combine, rows, weights_TK, assignment)


def row_weights(weights_TK: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """The routing weight of each sorted row: [T, K] fp32 -> [R, 1] fp32."""
    return call(_RowWeights, weights_TK, assignment)


def sum_rows(rows: paddle.Tensor, assignment: Assignment) -> paddle.Tensor:
    """Plain sum of each token's rows, which the experts have weighed: [R, D] -> [T, D]."""
    return call(_SumRows, rows, assignment)
