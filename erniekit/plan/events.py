"""The pipeline's actions executed on a clock: when each stage computes, waits and sends. Pure arithmetic.

Times are NumPy arrays over replicas of the pipeline (data ranks), which all execute the same lists with durations of
their own; a single replica is an array of one number. An action begins when its stage is free and its message has
arrived. A send does not occupy its stage, unless sends are synchronous: then both sides are busy for the transfer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from erniekit.parallel.pipeline_schedule import Action, Backward, Compute, Forward, Recv, Send

# The seconds of an action of a stage, [replicas] or a single number.
Duration = Callable[[int, Compute], "np.ndarray | float"]


@dataclass(frozen=True)
class Event:
    """An action of a stage, or a transfer, in one replica."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass
class Timeline:
    """What happened. `finished`, `busy`: seconds at which each stage finished, and for which it computed,
    [stages, replicas]; `events`: those of the replica that was recorded.
    """

    finished: np.ndarray
    busy: np.ndarray
    events: list[Event] = field(default_factory=list)

    @property
    def seconds(self) -> np.ndarray:
        """When each replica's last stage finished [replicas]."""
        return self.finished.max(axis=0)


def execute(
    actions: Sequence[Sequence[Action]],
    duration: Duration,
    transfer: float,
    synchronous: bool = False,
    replicas: int = 1,
    recorded: int | None = 0,
) -> Timeline:
    """Execute the lists of all stages. `transfer`: seconds of a message; `recorded`: the replica whose events are kept,
    None for none.
    """
    clock = _Clock(actions, duration, transfer, synchronous, replicas, recorded)
    moved = True
    while moved:
        moved = False
        for stage in range(len(actions)):
            while clock.advance(stage):
                moved = True
    assert clock.is_done, "a stage waits for a message that is never sent"
    return Timeline(clock.free, clock.busy, clock.events)


class _Clock:
    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        duration: Duration,
        transfer: float,
        synchronous: bool,
        replicas: int,
        recorded: int | None,
    ) -> None:
        self._todo = [deque(one) for one in actions]
        self._duration, self._transfer, self._synchronous = duration, transfer, synchronous
        self._recorded = recorded
        self._arrivals: dict[tuple[int, int], deque[np.ndarray]] = {}
        self.free = np.zeros((len(actions), replicas))
        self.busy = np.zeros((len(actions), replicas))
        self.events: list[Event] = []

    @property
    def is_done(self) -> bool:
        return not any(self._todo)

    def advance(self, stage: int) -> bool:
        """Execute the next action of a stage, if it can be executed now."""
        if not self._todo[stage]:
            return False
        action = self._todo[stage][0]
        if isinstance(action, Forward | Backward):
            start = self.free[stage].copy()
            seconds = self._duration(stage, action)
            self.free[stage] += seconds
            self.busy[stage] += seconds
            self._record(stage, action, start, self.free[stage])
        elif isinstance(action, Send):
            if not self._send(stage, action):
                return False
        elif not self._receive(stage, action):
            return False
        self._todo[stage].popleft()
        return True

    def _send(self, stage: int, action: Send) -> bool:
        if not self._synchronous:
            arrival = self.free[stage] + self._transfer
            self._arrivals.setdefault((stage, action.peer), deque()).append(arrival)
            self._record(stage, action, self.free[stage], arrival)
            return True
        waiting = self._todo[action.peer]
        if not waiting or not isinstance(waiting[0], Recv) or waiting[0].peer != stage:
            return False
        start = np.maximum(self.free[stage], self.free[action.peer])
        self.free[stage] = self.free[action.peer] = start + self._transfer
        self._record(stage, action, start, self.free[stage])
        waiting.popleft()
        return True

    def _receive(self, stage: int, action: Recv) -> bool:
        arrived = self._arrivals.get((action.peer, stage))
        if self._synchronous or not arrived:
            return False  # the sender completes a synchronous transfer
        self.free[stage] = np.maximum(self.free[stage], arrived.popleft())
        return True

    def _record(self, stage: int, action: Action, start: np.ndarray, end: np.ndarray) -> None:
        if self._recorded is not None:
            self.events.append(Event(stage, action, float(start[self._recorded]), float(end[self._recorded])))
