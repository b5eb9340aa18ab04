"""Pipeline schedules as plain lists of actions, one list for each stage. Nothing here computes or communicates.

Legend: p stages, v chunks on each stage, m microbatches. The model is cut into p*v pieces; piece c*p + s is chunk c of
stage s. Three schedules, all with as little idle time as their pieces allow:

* `1f1b` (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): v = 1.
* `interleaved` (the same, section 2.2.2): v > 1, a bubble v times smaller for v times the transfers.
* `memory_efficient`: interleaved with a shorter warm-up: one microbatch more than the next stage instead of two, as in
  1F1B. The bubble stays, p - 1 - s chunks fewer are kept on stage s (see `peak_live`). The price is slack: a transfer
  has no spare forward pass to hide behind, so `interleaved` is the faster one where transfers are slow and run beside
  the computation. Where a send waits for its receiver it is the other way round, see `bubble_fraction`.

Microbatches of interleaved schedules go in groups: chunk 0 for the whole group, then chunk 1, ... A group needs at
least p microbatches to keep every stage busy, so m are divided into m // p groups whose sizes differ by at most one; m
need not be a multiple of p. Fewer than p make one group.

Why no execution in list order can deadlock, even where a send waits for its receiver: all actions of all stages stand
in one total order, in which a transfer is one element, and each stage's list is a part of that order. The first element
not yet executed has everything it needs: its stage, or both stages, stand before it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from erniekit.utils.errors import ConfigError

SCHEDULES = ("1f1b", "interleaved", "memory_efficient")
# Clock of the total order: a backward pass costs about two forward passes. Another ratio changes where a transfer
# stands, not whether the lists are right.
FORWARD_COST, BACKWARD_COST = 1, 2


@dataclass(frozen=True)
class Forward:
    """Run chunk `chunk` of this stage on microbatch `microbatch`."""

    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Backward:
    """The backward pass of the same."""

    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Send:
    """Give stage `peer` what this stage's `chunk` made: its output ("activation") or its input's gradient."""

    what: Literal["activation", "gradient"]
    chunk: int
    microbatch: int
    peer: int


@dataclass(frozen=True)
class Recv:
    """Take from stage `peer` what this stage's `chunk` needs: its input ("activation") or its output's gradient."""

    what: Literal["activation", "gradient"]
    chunk: int
    microbatch: int
    peer: int


Compute = Forward | Backward
Action = Forward | Backward | Send | Recv


def plan(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """Each stage's actions of one training step. A single stage gives F0 B0 F1 B1 ... without transfers."""
    check_schedule(schedule, stages, chunks)
    return _with_transfers([_compute_order(schedule, s, stages, microbatches, chunks) for s in range(stages)])


def forward_plan(stages: int, microbatches: int, chunks: int = 1) -> list[list[Action]]:
    """Each stage's actions where nothing is trained: evaluation, a reference model."""
    forwards: list[Compute] = [Forward(c, i) for c, i in _in_groups(stages, microbatches, chunks)]
    return _with_transfers([forwards] * stages)


def check_schedule(schedule: str, stages: int, chunks: int) -> None:
    """Raise ConfigError where a schedule does not exist for these numbers."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"pipeline schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if chunks > 1 and stages == 1:
        raise ConfigError(
            f"virtual_pp_degree {chunks} with pipeline_parallel_degree 1: one stage has nothing to interleave. "
            "Set virtual_pp_degree: 1, or more stages"
        )
    if chunks > 1 and schedule == "1f1b":
        raise ConfigError(
            f"virtual_pp_degree {chunks}: the 1f1b schedule has one chunk a stage. "
            "Set virtual_pp_degree: 1, or choose interleaved or memory_efficient"
        )
    if chunks == 1 and stages > 1 and schedule != "1f1b":
        raise ConfigError(
            f"the {schedule} schedule needs at least 2 chunks a stage. Set virtual_pp_degree: 2, or choose 1f1b"
        )


def bubble_fraction(stages: int, microbatches: int, chunks: int = 1) -> float:
    """The part of a step that a stage stands idle, transfers taken as free and all pieces as equally long.

    Every schedule here takes max(v m + p - 1, v p + m - 1) times the time of one piece's forward and backward, whatever
    the ratio of the two, and v m of them are work. So for m >= p the bubble is (p - 1) / (v m + p - 1). That is for
    transfers that wait in a buffer. Where a send waits for its receiver, and a backward pass is as long as two forward
    passes, 1f1b and memory_efficient take no longer; interleaved took up to 1.3 times as long (up to 12 stages tried).
    """
    work = chunks * microbatches
    return 1 - work / max(work + stages - 1, chunks * stages + microbatches - 1)


def peak_live(schedule: str, stage: int, stages: int, microbatches: int, chunks: int = 1) -> int:
    """The most chunk inputs whose activations a stage keeps at one time; each is 1 / v of the stage's layers.

    With groups of at most g microbatches, g = ceil(m / max(m // p, 1)) (that is p where p divides m):
    1f1b min(p - s, m); memory_efficient min(p - s + (v - 1) g, v m); interleaved min(2 (p - s) - 1 + (v - 1) g, v m).
    """
    return min(_warm_up(schedule, stage, stages, microbatches, chunks) + 1, chunks * microbatches)


def describe(schedule: str, microbatches: int, layers: Sequence[Sequence[Sequence[int]]]) -> str:
    """One line for the log. `layers[s][c]`: the layer numbers of chunk c of stage s."""
    stages, chunks = len(layers), len(layers[0])
    bubble = bubble_fraction(stages, microbatches, chunks)
    peaks = [peak_live(schedule, s, stages, microbatches, chunks) for s in range(stages)]
    shown = " | ".join("+".join(_layer_range(piece) for piece in pieces) for pieces in layers)
    return (
        f"pipeline: {schedule}, {stages} stages x {chunks} chunks, {microbatches} microbatches, bubble {bubble:.1%}, "
        f"chunk activations kept at most {', '.join(map(str, peaks))}; layers {shown}"
    )


def _layer_range(piece: Sequence[int]) -> str:
    return str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}"


def _group_sizes(stages: int, microbatches: int) -> list[int]:
    """Sizes that differ by at most one, larger ones first: a later, larger group would find too short a warm-up."""
    count = max(microbatches // stages, 1)
    return [microbatches // count + (i < microbatches % count) for i in range(count)]


def _in_groups(stages: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """(chunk, microbatch) in the order of the forward passes, the same on every stage."""
    order, start = [], 0
    for size in _group_sizes(stages, microbatches):
        order += [(chunk, i) for chunk in range(chunks) for i in range(start, start + size)]
        start += size
    return order


def _warm_up(schedule: str, stage: int, stages: int, microbatches: int, chunks: int) -> int:
    """Forward passes of a stage before it alternates forward and backward."""
    ahead_of_next = 2 if schedule == "interleaved" else 1
    largest_group = _group_sizes(stages, microbatches)[0]
    return ahead_of_next * (stages - 1 - stage) + (chunks - 1) * largest_group


def _compute_order(schedule: str, stage: int, stages: int, microbatches: int, chunks: int) -> list[Compute]:
    order = _in_groups(stages, microbatches, chunks)
    forwards: list[Compute] = [Forward(c, i) for c, i in order]
    backwards: list[Compute] = [Backward(chunks - 1 - c, i) for c, i in order]
    warm_up = min(_warm_up(schedule, stage, stages, microbatches, chunks), len(order))
    steady = [action for pair in zip(forwards[warm_up:], backwards) for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[len(order) - warm_up :]]


class _Clock:
    """When each stage runs each of its actions if transfers are free and nobody waits for a receiver."""

    def __init__(self, orders: list[list[Compute]]) -> None:
        self.stages = len(orders)
        self.num_pieces = self.stages * (1 + max(action.chunk for action in orders[0]))
        self.start: dict[tuple[int, Compute], int] = {}
        waiting = [list(reversed(order)) for order in orders]
        free = [0] * self.stages
        running = True
        while running:
            running = False
            for stage, todo in enumerate(waiting):
                while todo and (ready := self._ready(stage, todo[-1])) is not None:
                    action, running = todo.pop(), True
                    self.start[stage, action] = max(free[stage], ready)
                    free[stage] = self.end(stage, action)
        assert not any(waiting), "a stage waits for something that is never computed"
        # Both sorted, since a stage's actions follow one another.
        self.starts = [[self.start[stage, action] for action in order] for stage, order in enumerate(orders)]
        self.ends = [[self.end(stage, action) for action in order] for stage, order in enumerate(orders)]

    def end(self, stage: int, action: Compute) -> int:
        cost = FORWARD_COST if isinstance(action, Forward) else BACKWARD_COST
        return self.start[stage, action] + cost

    def neighbour(self, stage: int, action: Compute, step: int) -> tuple[int, Compute] | None:
        """The same action on the piece `step` pieces further on; None at the ends of the model."""
        piece = action.chunk * self.stages + stage + step
        if not 0 <= piece < self.num_pieces:
            return None
        return piece % self.stages, type(action)(piece // self.stages, action.microbatch)

    def _ready(self, stage: int, action: Compute) -> int | None:
        """When all that an action needs has been computed; None if that is not known yet."""
        before = self.neighbour(stage, action, -1 if isinstance(action, Forward) else 1)
        needed = [before] if before else []
        if isinstance(action, Backward):
            needed.append((stage, Forward(action.chunk, action.microbatch)))
        if any(key not in self.start for key in needed):
            return None
        return max((self.end(*key) for key in needed), default=0)

    def meeting(self, sender: int, receiver: int, made: int, used: int) -> int:
        """The time in [made, used] for a transfer: as late as possible without stopping either stage's computation."""
        times = {made, used}
        for stage in (sender, receiver):
            for ticks in (self.starts[stage], self.ends[stage]):
                times.update(ticks[bisect_left(ticks, made) : bisect_right(ticks, used)])
        return max(times, key=lambda time: (-max(self._delay(sender, time), self._delay(receiver, time)), time))

    def _delay(self, stage: int, time: int) -> int:
        """How long a stage that stops computing at its next chance still computes at `time`."""
        last = bisect_left(self.starts[stage], time) - 1
        return max(self.ends[stage][last] - time, 0) if last >= 0 else 0


def _with_transfers(orders: list[list[Compute]]) -> list[list[Action]]:
    """Put every transfer into one total order of all actions, and give each stage its part of it."""
    clock = _Clock(orders)
    stages = len(orders)
    events: list[tuple[tuple[int, ...], list[tuple[int, Action]]]] = []
    for number, ((stage, action), start) in enumerate(clock.start.items()):
        events.append(((start, 1, 0, number), [(stage, action)]))
        forward = isinstance(action, Forward)
        after = clock.neighbour(stage, action, 1 if forward else -1)
        if after is None or stages == 1:
            continue
        peer, consumer = after
        time = clock.meeting(stage, peer, clock.end(stage, action), clock.start[after])
        # At one time, links 0-1, 2-3, ... come before 1-2, 3-4, ...: no chain of stages waits for one another.
        link = min(stage, peer) if abs(stage - peer) == 1 else stages - 1
        what: Literal["activation", "gradient"] = "activation" if forward else "gradient"
        send = Send(what, action.chunk, action.microbatch, peer)
        recv = Recv(what, consumer.chunk, consumer.microbatch, stage)
        events.append(((time, 0, link % 2, number), [(stage, send), (peer, recv)]))
    lists: list[list[Action]] = [[] for _ in orders]
    for _, actions in sorted(events, key=lambda event: event[0]):
        for stage, part in actions:
            lists[stage].append(part)
    return lists
