"""Products of rows that are sorted by group (the expert they go to), one product a group."""

from collections.abc import Sequence

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn import cpu_ops, decoding, fused, mkl
from erniekit.nn.factors import factor
from erniekit.nn.gemm import gemm
from erniekit.nn.narrow import matmul
from erniekit.nn.nodes import call


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
        ctx.needed, ctx.counts = (not rows.stop_gradient, not weight.stop_gradient), counts
        ctx.save_for_backward(weight, *([rows] if ctx.needed[1] else []))
        if _in_one_call(rows):
            return fused.grouped_product(rows, weight, counts)
        return _of_groups(rows, weight, counts)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        (weight, *rows), drows, dweight = ctx.saved_tensor(), None, None
        if ctx.needed[0] and _in_one_call(dy):
            drows = fused.grouped_product(dy, weight, ctx.counts, transpose_right=True)
        elif ctx.needed[0]:
            drows = _of_groups(dy, weight, ctx.counts, transpose=True)
        if ctx.needed[1] and _in_one_call(dy):
            dweight = fused.grouped_product(rows[0], dy, ctx.counts, transpose_left=True)
        elif ctx.needed[1]:
            dweight = _weight_gradient(rows[0], dy, ctx.counts, weight)
        return drows, dweight


def _of_groups(
    rows: paddle.Tensor, weight: paddle.Tensor, counts: Sequence[int], transpose: bool = False
) -> paddle.Tensor:
    """The rows of each group times its matrix, or the transposed one."""
    spans, columns = row_spans(counts), weight.shape[1 if transpose else 2]
    if not spans:
        return paddle.zeros([0, columns], dtype=rows.dtype)
    if cpu_ops.applies(rows) and cpu_ops.applies(weight):
        out = cpu_ops.unfilled([rows.shape[0], columns], rows)
        inner, stored_columns, size = rows.shape[1], weight.shape[2], weight.shape[1] * weight.shape[2]
        if decoding.is_running() and mkl.is_available():
            groups, begins, ends = np.array(spans, np.uint64).T
            strides, row_size = (inner, stored_columns, columns), np.uint64(rows.element_size())
            products = mkl.Products((ends - begins).astype(np.int32), columns, inner, strides, transpose)
            products.run(
                np.uint64(rows.data_ptr()) + row_size * np.uint64(inner) * begins,
                np.uint64(weight.data_ptr()) + row_size * np.uint64(size) * groups,
                np.uint64(out.data_ptr()) + row_size * np.uint64(columns) * begins,
            )
            return out
        rows, weight = factor(rows), factor(weight)
        for e, begin, end in spans:
            matrix = weight.data_ptr() + weight.element_size() * e * size, stored_columns
            places = cpu_ops.row_address(rows, begin), matrix, cpu_ops.row_address(out, begin)
            gemm(False, transpose, end - begin, columns, inner, *places, factors=rows.dtype)
        return out
    return paddle.concat([matmul(rows[begin:end], weight[e], transpose_y=transpose) for e, begin, end in spans], axis=0)


def _weight_gradient(
    rows: paddle.Tensor, dy: paddle.Tensor, counts: Sequence[int], weight: paddle.Tensor
) -> paddle.Tensor:
    """[E, in, out]."""
    spans = row_spans(counts)
    if spans and cpu_ops.applies(rows) and cpu_ops.applies(dy):
        rows, dy = factor(rows), factor(dy)
        grads = (paddle.empty_like if len(spans) == len(counts) else paddle.zeros_like)(weight)
        for e, begin, end in spans:
            cpu_ops.matmul_into(grads[e], rows[begin:end], dy[begin:end], transpose_x=True)
        return grads
    products = [paddle.zeros(weight.shape[1:], dtype=weight.dtype)] * len(weight)
    for e, begin, end in spans:
        products[e] = matmul(rows[begin:end], dy[begin:end], transpose_x=True)
    return paddle.stack(products)


def _in_one_call(rows: paddle.Tensor) -> bool:
    return rows.shape[0] > 0 and fused.applies(fused.GROUPED_PRODUCT, rows)


def grouped_matmul(rows: paddle.Tensor, weight: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
    """rows [R, in] sorted by expert, weight [E, in, out], counts [E] summing to R -> [R, out]. An expert without rows
    gets a zero gradient.
    """
    return call(_GroupedMatmul, rows, weight, counts)
