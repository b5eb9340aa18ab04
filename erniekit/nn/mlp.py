"""The gated feed-forward block."""

from functools import lru_cache

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn import fused
from erniekit.nn.cpu_ops import multiply, multiply_, swish, swish_backward
from erniekit.nn.linear import Linear
from erniekit.nn.narrow import rounded


@lru_cache(maxsize=64)
def _halves_index(num_rows: int) -> paddle.Tensor:
    """[2 * num_rows]: the even numbers, then the odd ones."""
    return paddle.to_tensor(np.arange(2 * num_rows).reshape(-1, 2).T.reshape(-1))


class _SwiGLU(PyLayer):
    """For the CPU. Gate and up are gathered into two whole tensors."""

    @staticmethod
    def forward(ctx, gate_up: paddle.Tensor) -> paddle.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        both = paddle.gather(gate_up.reshape([2 * rows, size]), _halves_index(rows))
        ctx.save_for_backward(both)
        return multiply_(swish(both[:rows]), both[rows:])

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        (both,) = ctx.saved_tensor()
        gate, up = both[: dy.shape[0]], both[dy.shape[0] :]
        dup = multiply_(swish(gate), dy)
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
    return _SwiGLU.apply(gate_up.reshape([-1, width])).reshape([*lead, width // 2])


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
        return self.down_proj(swiglu(self.up_gate_proj(x)))
