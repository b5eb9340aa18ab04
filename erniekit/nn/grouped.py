"""Products of rows that are sorted by group (the expert they go to), one product a group."""

from collections.abc import Sequence

import paddle
from paddle.autograd import PyLayer

from erniekit.nn import fused
from erniekit.nn.narrow import matmul


def row_spans(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(group, begin, end) of the rows of each group that has some."""
    spans, begin = [], 0
    for group, count in enumerate(counts):
        if count:
            spans.append((group, begin, begin + count))
        begin += count
    return spans


class _GroupedMatmul(PyLayer):
    """rows of expert e times W[e]. One node for all experts: the gradient of the stack is built once, not scattered
    expert by expert. On a GPU one call makes the products of all experts.
    """

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        if _in_one_call(rows):
            return fused.grouped_product(rows, weight, counts)
        parts = [matmul(rows[begin:end], weight[e]) for e, begin, end in row_spans(counts)]
        return paddle.concat(parts, axis=0) if parts else paddle.zeros([0, weight.shape[2]], dtype=rows.dtype)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        rows, weight = ctx.saved_tensor()
        if _in_one_call(rows):
            drows = None if rows.stop_gradient else fused.grouped_product(dy, weight, ctx.counts, transpose_right=True)
            if weight.stop_gradient:
                return drows, None
            return drows, fused.grouped_product(rows, dy, ctx.counts, transpose_left=True)
        spans = row_spans(ctx.counts)
        drows = None
        if not rows.stop_gradient:
            parts = [matmul(dy[begin:end], weight[e], transpose_y=True) for e, begin, end in spans]
            drows = paddle.concat(parts, axis=0) if parts else paddle.zeros_like(rows)
        if weight.stop_gradient:
            return drows, None
        products = [paddle.zeros(weight.shape[1:], dtype=weight.dtype)] * len(weight)
        for e, begin, end in spans:
            products[e] = matmul(rows[begin:end], dy[begin:end], transpose_x=True)
        return drows, paddle.stack(products)


def _in_one_call(rows: paddle.Tensor) -> bool:
    return rows.shape[0] > 0 and fused.applies(fused.GROUPED_PRODUCT, rows)


def grouped_matmul(rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """rows [R, in] sorted by expert, weight [E, in, out], counts [E] summing to R -> [R, out]. An expert without rows
    gets a zero gradient.
    """
    return _GroupedMatmul.apply(rows, weight, counts)
