"""Rows in another order."""

from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn.narrow import gather


class _Permute(PyLayer):
    """A gather of all rows, whose adjoint is the gather by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: paddle.Tensor, order: np.ndarray) -> paddle.Tensor:
        ctx.order = order
        return gather(rows, paddle.to_tensor(order))

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        return gather(dy, paddle.to_tensor(np.argsort(ctx.order)))


def permute(rows: paddle.Tensor, order: np.ndarray) -> paddle.Tensor:
    """rows[order] for a permutation of all rows [R, D]. Without rows it is a step of the graph, too: the backward pass
    runs independent steps by their distance from the loss, and every rank must start its collectives in one order.
    """
    return _Permute.apply(rows, order)
