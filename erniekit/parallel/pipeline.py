"""Runs one stage's list of actions (parallel/pipeline_schedule.py): the forward and backward passes of its chunks, and
the transfers to and from other stages. A process that holds the whole model is a single stage without transfers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import paddle

from erniekit.parallel import comm
from erniekit.parallel.pipeline_schedule import Action, Backward, Forward, Recv, Send

Place = tuple[int, int]  # chunk, microbatch


class Stage(Protocol):
    """A stage's part of the model together with its microbatches, which every stage has."""

    def forward(
        self, chunk: int, microbatch: int, x: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(y, loss) of one chunk.

        Args:
            x: what the piece before made; None for the first piece of the model.

        Returns:
            y: what the next piece gets; None for the last piece.
            loss: a scalar, this chunk's own share of the loss (router losses, on the last piece also the head's), or
                None if it has none.
        """
        ...

    def input_shape(self, chunk: int, microbatch: int) -> tuple[Sequence[int], Any]:
        """Shape and dtype of x. Each stage works them out by itself: nothing but activations is exchanged."""
        ...

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Called after each chunk's backward pass, before its gradient is sent on."""
        ...


@dataclass
class _Kept:
    """What a backward pass starts from, and the input whose gradient it leaves."""

    x: paddle.Tensor | None
    y: paddle.Tensor | None
    loss: paddle.Tensor | None


def run(actions: Sequence[Action], stage: Stage, ranks: Sequence[int]) -> int:
    """Train on one step's microbatches: gradients are added to the parameters'.

    Args:
        actions: this stage's list of `schedule.plan`, or of `schedule.forward_plan` (nothing is then recorded).
        ranks: the rank of each stage, as in `mesh.pipe_group.ranks`.

    Returns:
        The most chunks whose activations were kept at one time; `schedule.peak_live` tells it beforehand.
    """
    trains = any(isinstance(action, Backward) for action in actions)
    with paddle.set_grad_enabled(trains):
        executor = _Executor(stage, ranks, trains)
        for action in actions:
            executor.execute(action)
    assert not executor.kept and not executor.received and not executor.made, "an activation that nobody used"
    return executor.peak


class _Executor:
    """What is under way on one stage. Everything is dropped by the action that uses it last."""

    def __init__(self, stage: Stage, ranks: Sequence[int], trains: bool) -> None:
        self.pp_stage, self.ranks, self.trains = stage, ranks, trains
        self.kept: dict[Place, _Kept] = {}
        self.received: dict[tuple[str, Place], paddle.Tensor] = {}
        self.made: dict[tuple[str, Place], paddle.Tensor] = {}
        self.peak = 0

    def execute(self, action: Action) -> None:
        place = (action.chunk, action.microbatch)
        if isinstance(action, Forward):
            self._forward(place)
        elif isinstance(action, Backward):
            self._backward(place)
        elif isinstance(action, Send):
            comm.send(self.made.pop((action.what, place)), self.ranks[action.peer])
        else:
            self.received[action.what, place] = self._receive(action, place)

    def _receive(self, action: Recv, place: Place) -> paddle.Tensor:
        if action.what == "activation":
            shape, dtype = self.pp_stage.input_shape(*place)
        else:
            y = self.kept[place].y
            assert y is not None
            shape, dtype = y.shape, y.dtype
        return comm.recv(shape, dtype, self.ranks[action.peer])

    def _forward(self, place: Place) -> None:
        x = self.received.pop(("activation", place), None)
        if x is not None:
            x.stop_gradient = not self.trains
        y, loss = self.pp_stage.forward(*place, x)
        if y is not None:
            self.made["activation", place] = y.detach()
        if self.trains:
            self.kept[place] = _Kept(x, y, loss)
            self.peak = max(self.peak, len(self.kept))

    def _backward(self, place: Place) -> None:
        kept = self.kept.pop(place)
        dy = self.received.pop(("gradient", place), None)
        # Without a trainable weight so far (LoRA on later layers only), there is no graph to go back through.
        roots = [(t, dt) for t, dt in ((kept.y, dy), (kept.loss, None)) if t is not None and not t.stop_gradient]
        if roots:
            tensors, gradients = zip(*roots)
            paddle.autograd.backward(list(tensors), list(gradients))
        self.pp_stage.after_backward(*place)
        if kept.x is not None:
            dx = kept.x.grad
            self.made["gradient", place] = paddle.zeros_like(kept.x) if dx is None else dx
