"""Runs one stage's list of actions (parallel/pipeline_schedule.py): the forward and backward passes of its chunks, and
the transfers to and from other stages. A process that holds the whole model is a single stage without transfers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import paddle

from erniekit.parallel import comm
from erniekit.parallel.pipeline_schedule import Action, Backward, Forward, Recv, Send
from erniekit.utils.spans import span

Place = tuple[int, int]  # chunk, microbatch


class Stage(Protocol):
    """The chunks of the model on one stage, together with the microbatches, which every stage has."""

    def forward(
        self, chunk: int, microbatch: int, x: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(y, loss) of one chunk.

        Args:
            x: the output of the chunk before; None for the first chunk of the model.

        Returns:
            y: the input of the next chunk; None for the last chunk of the model.
            loss: a scalar, the terms of the loss that this chunk computes (router losses, on the last chunk also the
                head's), or None if there are none.
        """
        ...

    def input_shape(self, chunk: int, microbatch: int) -> tuple[Sequence[int], Any]:
        """Shape and dtype of x. Each stage derives them by itself: nothing but activations is exchanged."""
        ...

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Called after each chunk's backward pass, before the gradient of its input is sent."""
        ...


@dataclass
class _Activations:
    """The outputs from which a backward pass starts, and the input for which it computes a gradient."""

    x: paddle.Tensor | None
    y: paddle.Tensor | None
    loss: paddle.Tensor | None


def run(actions: Sequence[Action], stage: Stage, ranks: Sequence[int]) -> int:
    """Train on one step's microbatches: gradients are added to the parameters'.

    Args:
        actions: this stage's list of `pipeline_schedule.plan`, or of `forward_plan` (nothing is then recorded).
        ranks: the rank of each stage, as in `mesh.pipe_group.ranks`.

    Returns:
        The largest number of chunks whose activations were stored at one time: `pipeline_schedule.peak_live`.
    """
    trains = any(isinstance(action, Backward) for action in actions)
    with paddle.set_grad_enabled(trains):
        executor = _Executor(stage, ranks, trains)
        for action in actions:
            executor.execute(action)
    assert not executor.live and not executor.received and not executor.outputs, "an activation was not used"
    return executor.peak


class _Executor:
    """Executes the actions of one stage. Each tensor is dropped by the action that uses it last."""

    def __init__(self, pp_stage: Stage, ranks: Sequence[int], trains: bool) -> None:
        self.pp_stage, self.ranks, self.trains = pp_stage, ranks, trains
        self.live: dict[Place, _Activations] = {}
        self.received: dict[tuple[str, Place], paddle.Tensor] = {}
        self.outputs: dict[tuple[str, Place], paddle.Tensor] = {}
        self.peak = 0

    def execute(self, action: Action) -> None:
        place = (action.chunk, action.microbatch)
        if isinstance(action, Forward):
            self._forward(place)
        elif isinstance(action, Backward):
            self._backward(place)
        elif isinstance(action, Send):
            comm.send(self.outputs.pop((action.what, place)), self.ranks[action.peer])
        else:
            self.received[action.what, place] = self._receive(action, place)

    def _receive(self, action: Recv, place: Place) -> paddle.Tensor:
        if action.what == "activation":
            shape, dtype = self.pp_stage.input_shape(*place)
        else:
            y = self.live[place].y
            assert y is not None
            shape, dtype = y.shape, y.dtype
        return comm.recv(shape, dtype, self.ranks[action.peer])

    def _forward(self, place: Place) -> None:
        x = self.received.pop(("activation", place), None)
        if x is not None:
            x.stop_gradient = not self.trains
        with span("forward"):
            y, loss = self.pp_stage.forward(*place, x)
        if y is not None:
            self.outputs["activation", place] = y.detach()
        if self.trains:
            self.live[place] = _Activations(x, y, loss)
            self.peak = max(self.peak, len(self.live))

    def _backward(self, place: Place) -> None:
        activations = self.live.pop(place)
        dy = self.received.pop(("gradient", place), None)
        # Without a trainable weight so far (LoRA on later layers only), there is no graph.
        roots = [
            (t, dt)
            for t, dt in ((activations.y, dy), (activations.loss, None))
            if t is not None and not t.stop_gradient
        ]
        if roots:
            tensors, gradients = zip(*roots)
            with span("backward"):
                paddle.autograd.backward(list(tensors), list(gradients))
        with span("gradients"):
            self.pp_stage.after_backward(*place)
        if activations.x is not None:
            dx = activations.x.grad
            self.outputs["gradient", place] = paddle.zeros_like(activations.x) if dx is None else dx
