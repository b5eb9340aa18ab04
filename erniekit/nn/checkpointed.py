"""Activation checkpointing: compute activations again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute as paddle_recompute


def to_host(tensor: paddle.Tensor) -> paddle.Tensor:
    """A copy of a saved input in host memory: on a GPU in pinned memory; on a CPU it takes as much as the input."""
    copy = tensor.detach().clone() if tensor.place.is_cpu_place() else tensor.pin_memory()
    copy.stop_gradient = tensor.stop_gradient
    return copy


def to_device(copy: paddle.Tensor) -> paddle.Tensor:
    """The saved input on the device again."""
    tensor = copy if copy.place.is_cpu_place() else copy.cuda()
    tensor.stop_gradient = copy.stop_gradient
    return tensor


def recomputed(forward: Callable[..., Any], draws_noise: bool = False, offloads: bool = False) -> Callable[..., Any]:
    """`forward(x, *args)`, recomputing itself while gradients are recorded; results are the same bit for bit.

    Its result is any nest of tensors and host values; x, weights, and tensors among the `args` that need one get
    gradients. `draws_noise`: it draws random numbers (dropout), which must be the same again. `offloads`: its inputs
    wait in host memory for the backward pass.
    """

    def run(x: paddle.Tensor, *args: Any) -> Any:
        if not paddle.is_grad_enabled():
            return forward(x, *args)
        nest: list[Any] = []
        if x.stop_gradient:  # a frozen embedding: without a wanted input nothing inside would get a gradient
            x = x.detach()
            x.stop_gradient = False
        wanted = [place for place, arg in enumerate(args) if _needs_gradient(arg)]
        inputs = [args[place] for place in wanted]
        others = [None if place in wanted else arg for place, arg in enumerate(args)]

        def flat(x: paddle.Tensor, *inputs: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
            given = list(others)
            for place, tensor in zip(wanted, inputs, strict=True):
                given[place] = tensor
            nest[:] = [forward(x, *given)]
            if offloads and not paddle.is_grad_enabled():
                # From here on Paddle saves the inputs of `flat`, and nothing else.
                with paddle.enable_grad():  # without it, Paddle ignores hooks
                    stack.enter_context(paddle.autograd.saved_tensors_hooks(to_host, to_device))
            return tuple(leaf for leaf in paddle.utils.flatten(nest[0]) if isinstance(leaf, paddle.Tensor))

        with ExitStack() as stack:
            outputs = paddle_recompute(flat, x, *inputs, use_reentrant=True, preserve_rng_state=draws_noise)
        tensors = iter([outputs] if isinstance(outputs, paddle.Tensor) else outputs)
        first = nest.pop()  # the structure and its host values; its tensors know no gradient
        leaves = [next(tensors) if isinstance(leaf, paddle.Tensor) else leaf for leaf in paddle.utils.flatten(first)]
        return paddle.utils.pack_sequence_as(first, leaves)

    return run


def _needs_gradient(arg: Any) -> bool:
    return isinstance(arg, paddle.Tensor) and not arg.stop_gradient
