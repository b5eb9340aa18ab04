"""Calls nodes of the autograd graph, or, where nothing is recorded, only what they compute."""

from typing import Any

import paddle
from paddle.autograd import PyLayer


class _Unrecorded:
    """Stands for a node's context where there is no backward pass: what is kept in it lives as long as the call."""

    def save_for_backward(self, *tensors: paddle.Tensor) -> None:
        """Keep nothing."""


def call(node: type[PyLayer], *arguments: Any) -> Any:
    """node.apply(*arguments). Without gradients it calls `forward` directly: making a node takes longer than many a
    small operation, and a decoding step consists of these.
    """
    return node.apply(*arguments) if paddle.is_grad_enabled() else node.forward(_Unrecorded(), *arguments)
