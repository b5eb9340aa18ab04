"""The times of a step's parts, as consecutive intervals of which each belongs to one part.

Every boundary of a part is a mark, and the time between two marks belongs to the part that was innermost: so the
intervals of a step add up to its time. In the forward pass parts lie inside one another. The backward pass computes
parallel branches (routed experts, shared experts, router) in turns, an operation of each; there a mark says only which
part continues (`switch`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import paddle

from erniekit.utils.spans import Listener

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
DATA, OPTIMIZER, COMMUNICATION = "data", "optimizer", "communication"
# What is outside of every named part of a phase.
OUTSIDE = "residuals, sums of gradients"
HEAD = "head and loss"


class Clock(Protocol):
    """Moments on a device, which may be known later than they are taken."""

    def mark(self) -> Any:
        """The present moment."""
        ...

    def seconds(self, moments: list[Any]) -> list[float]:
        """Moments as seconds, in any but one origin. It may wait for the device."""
        ...


class HostClock:
    """The clock of a CPU, where an operation has ended when its call returns."""

    def mark(self) -> float:
        """See Clock."""
        return time.perf_counter()

    def seconds(self, moments: list[float]) -> list[float]:
        """See Clock."""
        return moments


class DeviceClock:
    """The clock of a GPU, which computes asynchronously: each mark is an event of the stream of computation."""

    def mark(self) -> Any:
        """See Clock."""
        event = paddle.device.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moments: list[Any]) -> list[float]:
        """See Clock."""
        paddle.device.synchronize()
        return [moments[0].elapsed_time(moment) / 1e3 for moment in moments]


@dataclass(frozen=True)
class Interval:
    """Time on the device that belongs to one part: `name` ("attention"), its `layer` (-1: of none) and the phase of the
    step. `start` and `seconds` are of the device, `host` are the host's seconds between the same marks.
    """

    name: str
    layer: int
    phase: str
    start: float
    seconds: float
    host: float


@dataclass(frozen=True)
class Part:
    """A part that has begun."""

    name: str
    layer: int
    phase: str


class Recorder(Listener):
    """Records marks while it is switched on, and turns them into intervals at the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: list[Part] = []
        self._marks: list[tuple[Any, float, Part | None]] = []  # the moment, and whose interval ended there
        self._has_head = False  # whether this rank runs the head
        self.origin = 0.0  # the host's time at the first mark, as seconds since the epoch

    @property
    def phase(self) -> str:
        """The phase of the innermost part; "host" outside of all."""
        return self._open[-1].phase if self._open else "host"

    def begin(self) -> None:
        """The first mark."""
        self._open, self.origin = [], time.time()
        self._marks = [(self._clock.mark(), time.perf_counter(), None)]

    @property
    def around(self) -> Part | None:
        """The innermost part."""
        return self._open[-1] if self._open else None

    def enter(self, name: str, layer: int = -1, phase: str | None = None) -> None:
        """A part begins inside the innermost one."""
        self._mark()
        self._open.append(Part(name, layer, self.phase if phase is None else phase))

    def leave(self) -> None:
        """The innermost part ends."""
        self._mark()
        self._open.pop()

    def switch(self, name: str, layer: int) -> None:
        """The backward pass continues in another part."""
        if self.phase == BACKWARD:
            self._mark()
            self._open[-1] = Part(name, layer, BACKWARD)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """See Listener. Spans are phases of the step, but for the head's, which is a part of the forward pass."""
        if name == HEAD:
            self._has_head = True
            self.enter(HEAD)
        elif name == BACKWARD and self._has_head:
            self.enter(HEAD, phase=name)  # it begins there
        else:
            self.enter(OUTSIDE if name in (FORWARD, BACKWARD) else name, phase=name)
        try:
            yield
        finally:
            self.leave()

    def waiting(self, what: str | None) -> None:
        """A collective begins ("all_reduce of 12 bytes with ranks 0, 1"), or has ended (None)."""
        if what is not None:
            self.enter(what.split(" of ")[0], phase=COMMUNICATION)
        elif self._open and self._open[-1].phase == COMMUNICATION:
            self.leave()

    def end(self) -> list[Interval]:
        """The last mark; everything since the first one."""
        self._mark()
        moments = self._clock.seconds([mark[0] for mark in self._marks])
        intervals = []
        for index in range(1, len(self._marks)):
            part = self._marks[index][2] or Part("between the parts", -1, "host")
            start, host = moments[index - 1], self._marks[index][1] - self._marks[index - 1][1]
            seconds = moments[index] - start
            intervals.append(Interval(part.name, part.layer, part.phase, start - moments[0], seconds, host))
        self._marks = []
        return intervals

    def _mark(self) -> None:
        """The time since the last mark belongs to the innermost part."""
        self._marks.append((self._clock.mark(), time.perf_counter(), self.around))
