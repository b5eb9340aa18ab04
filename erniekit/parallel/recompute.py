"""Recompute decoder layers in the backward pass instead of keeping their activations (Chen et al. 2016, arXiv
1604.06174).
"""

from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute as paddle_recompute


def apply(layers: nn.LayerList, draws_noise: bool = False) -> None:
    """Make every layer of `layers` recompute itself while gradients are recorded; results are the same bit for bit.

    `draws_noise`: layers draw random numbers (dropout), which must be the same again.
    """
    for layer in layers:
        layer.forward = _Recomputed(layer.forward, draws_noise)


class _Recomputed:
    """forward(x, *args) -> (y, extra), extra any nest of tensors and host values. Only x and weights get gradients."""

    def __init__(self, forward: Any, draws_noise: bool) -> None:
        self._forward, self._draws_noise = forward, draws_noise

    def __call__(self, x: paddle.Tensor, *args: Any) -> tuple[paddle.Tensor, Any]:
        if not paddle.is_grad_enabled():
            return self._forward(x, *args)
        nest: list[Any] = []
        if x.stop_gradient:  # a frozen embedding: without a wanted input nothing inside would get a gradient
            x = x.detach()
            x.stop_gradient = False

        def flat(x: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
            nest[:] = [self._forward(x, *args)]
            return tuple(leaf for leaf in paddle.utils.flatten(nest[0]) if isinstance(leaf, paddle.Tensor))

        outputs = paddle_recompute(flat, x, use_reentrant=True, preserve_rng_state=self._draws_noise)
        tensors = iter([outputs] if isinstance(outputs, paddle.Tensor) else outputs)
        first = nest.pop()  # the structure and its host values; its tensors know no gradient
        leaves = [next(tensors) if isinstance(leaf, paddle.Tensor) else leaf for leaf in paddle.utils.flatten(first)]
        return paddle.utils.pack_sequence_as(first, leaves)
