"""Activation checkpointing: compute activations again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable
from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute as paddle_recompute


def recomputed(forward: Callable[..., Any], draws_noise: bool = False) -> Callable[..., Any]:
    """`forward(x, *args)`, recomputing itself while gradients are recorded; results are the same bit for bit.

    Its result is any nest of tensors and host values; only x and weights get gradients. `draws_noise`: it draws random
    numbers (dropout), which must be the same again.
    """

    def run(x: paddle.Tensor, *args: Any) -> Any:
        if not paddle.is_grad_enabled():
            return forward(x, *args)
        nest: list[Any] = []
        if x.stop_gradient:  # a frozen embedding: without a wanted input nothing inside would get a gradient
            x = x.detach()
            x.stop_gradient = False

        def flat(x: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
            nest[:] = [forward(x, *args)]
            return tuple(leaf for leaf in paddle.utils.flatten(nest[0]) if isinstance(leaf, paddle.Tensor))

        outputs = paddle_recompute(flat, x, use_reentrant=True, preserve_rng_state=draws_noise)
        tensors = iter([outputs] if isinstance(outputs, paddle.Tensor) else outputs)
        first = nest.pop()  # the structure and its host values; its tensors know no gradient
        leaves = [next(tensors) if isinstance(leaf, paddle.Tensor) else leaf for leaf in paddle.utils.flatten(first)]
        return paddle.utils.pack_sequence_as(first, leaves)

    return run
