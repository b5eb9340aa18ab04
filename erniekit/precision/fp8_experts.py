"""The routed experts in FP8 as one step: y = (w * swiglu(x U)) V for each expert's U [D, 2F] and V [F, D].

The input is quantised once, for the first product and for what is kept. Of the two results in between, the second is
computed again in the backward pass from the first, and the first, where asked, from the input in FP8.
"""

from typing import Any

import paddle
from paddle.autograd import PyLayer

from erniekit.precision.fp8_product import Backend
from erniekit.precision.fp8_tensor import Quantised


class Fp8Experts:
    """An ExpertBlock (moe/experts.py). `stores_fp8`: the input is kept in FP8. `recomputes_up_gate`: x U is not
    kept.
    """

    def __init__(self, backend: Backend, stores_fp8: bool = True, recomputes_up_gate: bool = False) -> None:
        self.backend, self.stores_fp8, self.recomputes_up_gate = backend, stores_fp8, recomputes_up_gate

    def __call__(
        self,
        rows: paddle.Tensor,
        up_gate: paddle.Tensor,
        down: paddle.Tensor,
        counts: list[int],
        weights_R1: paddle.Tensor | None,
    ) -> paddle.Tensor:
        """Rows [R, D] sorted by expert -> [R, D]; `weights_R1` [R, 1] fp32 stands for w, None for 1."""
        given = () if weights_R1 is None else (weights_R1,)
        return _Experts.apply(rows, up_gate, down, self, counts, *given)


class _Experts(PyLayer):
    @staticmethod
    def forward(ctx, rows, up_gate, down, block: Fp8Experts, counts: list[int], *weights):
        ctx.block, ctx.counts, ctx.tile = block, counts, None
        ctx.needs_rows, backend = not rows.stop_gradient, block.backend
        # Weights are constants where the router is frozen, or did not run because its modality has no tokens here.
        ctx.weights_need_gradient = [not each.stop_gradient for each in weights]
        if rows.shape[0] == 0:
            ctx.save_for_backward(up_gate, down)
            return paddle.zeros([0, down.shape[-1]], dtype=rows.dtype)
        x = backend.rows(rows, counts)
        kept = []
        ctx.keeps_rows = block.recomputes_up_gate or not up_gate.stop_gradient
        if ctx.keeps_rows:
            ctx.tile = x.tile if block.stores_fp8 else None
            kept = [x.codes, x.scales] if block.stores_fp8 else [rows]
        gate_up = backend.times(x, up_gate, counts, rows.dtype)
        if not block.recomputes_up_gate:
            kept.append(gate_up)
        ctx.save_for_backward(up_gate, down, *weights, *kept)
        hidden = backend.rows(backend.gated(gate_up, *weights), counts)
        return backend.times(hidden, down, counts, rows.dtype)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        up_gate, down, *saved = ctx.saved_tensor()
        block, counts, dtype = ctx.block, ctx.counts, dy.dtype
        backend = block.backend
        if dy.shape[0] == 0:
            return _zeros(ctx, up_gate, down, dtype)
        num_weights = len(ctx.weights_need_gradient)
        weights, kept = saved[:num_weights], saved[num_weights:]
        x = None
        if ctx.keeps_rows:
            x = kept[0] if ctx.tile is None else Quantised(kept[0], kept[1], ctx.tile)
        gate_up = None if block.recomputes_up_gate else kept[-1]
        if gate_up is None:
            rows = x if isinstance(x, Quantised) else backend.rows(x, counts)
            gate_up = backend.times(rows, up_gate, counts, dtype)
        dhidden = backend.times_transposed(backend.rows(dy, counts, "gradients"), down, counts, dtype)
        dgate_up, dweights, hidden = backend.gated_backward(gate_up, dhidden, *weights)
        ddown = None if down.stop_gradient else backend.weight_gradient(hidden, dy, counts, down.dtype)
        dup_gate = None if up_gate.stop_gradient else backend.weight_gradient(x, dgate_up, counts, up_gate.dtype)
        drows = None
        if ctx.needs_rows:
            drows = backend.times_transposed(backend.rows(dgate_up, counts, "gradients"), up_gate, counts, dtype)
        return drows, dup_gate, ddown, *[dweights if needed else None for needed in ctx.weights_need_gradient]


def _zeros(
    ctx: Any, up_gate: paddle.Tensor, down: paddle.Tensor, dtype: paddle.dtype
) -> tuple[paddle.Tensor | None, ...]:
    """The gradients where there are no rows."""
    drows = paddle.zeros([0, up_gate.shape[1]], dtype=dtype) if ctx.needs_rows else None
    zeros = [None if w.stop_gradient else paddle.zeros(w.shape, dtype=w.dtype) for w in (up_gate, down)]
    return drows, *zeros, *[paddle.zeros([0, 1]) if needed else None for needed in ctx.weights_need_gradient]
