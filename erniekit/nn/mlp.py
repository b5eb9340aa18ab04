"""The gated feed-forward block."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn import cpu_ops, decoding, fused
from erniekit.nn.cpu_ops import multiply, row_address, swish_backward, swish_times
from erniekit.nn.factors import factor
from erniekit.nn.gemm import gemm
from erniekit.nn.grouped import row_spans
from erniekit.nn.linear import Linear, Projection
from erniekit.nn.narrow import rounded
from erniekit.nn.nodes import call


@lru_cache(maxsize=64)
def _halves_index(num_rows: int) -> paddle.Tensor:
    """[2 * num_rows]: the even numbers, then the odd ones."""
    return paddle.to_tensor(np.arange(2 * num_rows).reshape(-1, 2).T.reshape(-1))


class _SwiGLU(PyLayer):
    """SwiGLU on a CPU, with gate and up gathered into two contiguous tensors."""

    @staticmethod
    def forward(ctx, gate_up: paddle.Tensor) -> paddle.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        both = paddle.gather(gate_up.reshape([2 * rows, size]), _halves_index(rows))
        ctx.save_for_backward(both)
        return swish_times(both[:rows], both[rows:])

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        (both,) = ctx.saved_tensor()
        gate, up = both[: dy.shape[0]], both[dy.shape[0] :]
        dup = swish_times(gate, dy)
        return paddle.concat([swish_backward(multiply(dy, up), gate), dup], axis=-1)


def swiglu(gate_up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up for gate_up [..., 2F] = gate | up -> [..., F] (Shazeer 2020, arXiv 2002.05202)."""
    if fused.applies(fused.SWIGLU, gate_up):
        return fused.swiglu(gate_up)
    if not gate_up.place.is_cpu_place():
        gate, up = gate_up.chunk(2, axis=-1)
        return nn.functional.silu(gate) * up
    return rounded(_cpu_swiglu, gate_up)


def _cpu_swiglu(gate_up: paddle.Tensor) -> paddle.Tensor:
    *lead, width = gate_up.shape
    rows = gate_up.reshape([-1, width])
    made = cpu_ops.swiglu(rows) if _is_small(rows) else call(_SwiGLU, rows)
    return made.reshape([*lead, width // 2])


def _is_small(gate_up_RW: paddle.Tensor) -> bool:
    """Whether one thread should compute with gate | up [R, 2F], without a backward pass."""
    if not (decoding.is_running() and cpu_ops.applies(gate_up_RW)):
        return False
    rows, width = gate_up_RW.shape
    return rows * width <= cpu_ops.MAX_IN_ONE_THREAD


class _GatedProducts(PyLayer):
    """swiglu(rows W) for rows sorted by group, for the CPU: gate and up are products of their own, written to whole
    tensors, and their gradients to the halves of W's. Nothing is gathered or joined.
    """

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, weight: paddle.Tensor, counts: Sequence[int]) -> paddle.Tensor:
        wide = weight.shape[-1]
        gate, up = (cpu_ops.unfilled([rows.shape[0], wide // 2], rows) for _ in range(2))
        ctx.needed, ctx.counts = (not rows.stop_gradient, not weight.stop_gradient), counts
        rows, matrices = factor(rows), factor(weight)
        for half, out in enumerate((gate, up)):
            for group, begin, end in row_spans(counts):
                sizes = end - begin, wide // 2, rows.shape[1]
                places = row_address(rows, begin), _half(matrices, group, half), row_address(out, begin)
                gemm(False, False, *sizes, *places, factors=rows.dtype)
        ctx.dtype = rows.dtype
        ctx.save_for_backward(weight, gate, up, *([rows] if ctx.needed[1] else []))
        return swish_times(gate, up)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        weight, gate, up, *rows = ctx.saved_tensor()
        dy, spans, (inner, wide) = dy.contiguous(), row_spans(ctx.counts), weight.shape[-2:]
        halves = factor(swish_backward(multiply(dy, up), gate)), factor(swish_times(gate, dy))
        assert halves[0].dtype == ctx.dtype
        drows = dweight = None
        if ctx.needed[0]:
            drows, matrices = cpu_ops.unfilled([dy.shape[0], inner], weight), factor(weight)
            for half, grad in enumerate(halves):
                for group, begin, end in spans:
                    places = row_address(grad, begin), _half(matrices, group, half), row_address(drows, begin)
                    gemm(False, True, end - begin, inner, wide // 2, *places, beta=float(half), factors=ctx.dtype)
        if ctx.needed[1]:
            dweight = (paddle.empty_like if len(spans) == len(ctx.counts) else paddle.zeros_like)(weight)
            for half, grad in enumerate(halves):
                for group, begin, end in spans:
                    places = row_address(rows[0], begin), row_address(grad, begin), _half(dweight, group, half)
                    gemm(True, False, inner, wide // 2, end - begin, *places, factors=ctx.dtype)
        return drows, dweight


def _half(weight: paddle.Tensor, group: int, half: int) -> tuple[int, int]:
    """The columns of gate (0) or up (1) of a group's matrix."""
    inner, wide = weight.shape[-2:]
    return weight.data_ptr() + weight.element_size() * (group * inner * wide + half * (wide // 2)), wide


def gated(projection: Projection, x: paddle.Tensor, counts: list[int] | None = None) -> paddle.Tensor:
    """swiglu(projection(x)): [..., in] -> [..., F]. Of experts, `counts` are the rows of each, sorted by expert.

    The steps of the graph do not depend on the number of rows, which may be none: see moe.all_to_all.permute.
    """
    weight = projection.lone_weight
    few = decoding.is_running() and x.shape[0] * projection.out_features <= cpu_ops.MAX_IN_ONE_THREAD
    if few or weight is None or not (cpu_ops.supports(x) and cpu_ops.applies(weight)):
        return swiglu(projection(x) if counts is None else projection(x, counts))
    rows = x.reshape([-1, x.shape[-1]])
    made = call(_GatedProducts, rows, weight, [rows.shape[0]] if counts is None else counts)
    return made.reshape([*x.shape[:-1], weight.shape[-1] // 2])


class SwiGLU(nn.Layer):
    """down(silu(gate x) * up x) with gate and up fused in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        parts = {"gate": intermediate_size, "up": intermediate_size}
        self.up_gate_proj = Linear(
            hidden_size, 2 * intermediate_size, bias=bias, parts=parts, split="column", init_std=init_std
        )
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, split="row", init_std=init_std)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(gated(self.up_gate_proj, x))
