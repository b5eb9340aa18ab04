"""Pipeline schedules as plain lists of actions, one list for each stage. Nothing here computes or communicates.

Legend: p stages, v chunks on each stage, m microbatches. The model is divided into p*v chunks;
model chunk c*p + s is chunk c of stage s. There are three schedules, all with the smallest possible bubble:

* `1f1b` (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): v = 1.
* `interleaved` (the same, section 2.2.2): v > 1, a bubble v times smaller for v times the transfers.
* `memory_efficient`: interleaved with a shorter warm-up: one microbatch more than the next stage instead of two, as in
  1F1B. The bubble is the same, and p - 1 - s chunks fewer are stored on stage s (see `peak_live`). In return a transfer
  does not overlap with a forward pass, so `interleaved` is faster where transfers are slow.

Microbatches of interleaved schedules go in groups: chunk 0 for the whole group, then chunk 1, ... A group needs at
least p microbatches to keep every stage busy, so the m microbatches are divided into m // p groups whose sizes differ
by at most one; m need not be a multiple of p. Fewer than p make one group.

Transfers are placed in the lists in one of two ways. Where a send does not wait (`comm.send`), it follows its
computation at once, so that it overlaps with the next one; a receive comes where its tensor is needed. Messages from
one stage to another are received in the order sent. Where a send waits for its receiver, that could deadlock; then
(`blocking_sends`) all actions of all stages have one total order, in which a transfer is one element, and each stage's
list is the subsequence of its own actions. The first element that is not yet executed always has its inputs, so there
is no deadlock.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from erniekit.utils.wording import count_of

SCHEDULES = ("1f1b", "interleaved", "memory_efficient")
Payload = Literal["activation", "gradient"]


@dataclass(frozen=True)
class Forward:
    """Run chunk `chunk` of this stage on microbatch `microbatch`."""

    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Backward:
    """Run the backward pass of chunk `chunk` on microbatch `microbatch`."""

    chunk: int
    microbatch: int


@dataclass(frozen=True)
class Send:
    """Send to stage `peer` the output of this stage's `chunk` ("activation") or the gradient of its input."""

    what: Payload
    chunk: int
    microbatch: int
    peer: int


@dataclass(frozen=True)
class Recv:
    """Receive from stage `peer` the input of this stage's `chunk` ("activation") or the gradient of its output."""

    what: Payload
    chunk: int
    microbatch: int
    peer: int


Compute = Forward | Backward
Action = Forward | Backward | Send | Recv


def plan(
    schedule: str, stages: int, microbatches: int, chunks: int = 1, blocking_sends: bool = False
) -> list[list[Action]]:
    """Each stage's actions of one training step. A single stage gives F0 B0 F1 B1 ... without transfers."""
    assert (schedule in ("interleaved", "memory_efficient")) == (chunks > 1) or stages == 1, "config/checks.py"
    assert schedule in SCHEDULES and (chunks == 1 or stages > 1), "config/checks.py refuses this"
    orders = [compute_order(schedule, s, stages, microbatches, chunks) for s in range(stages)]
    return _in_one_order(orders) if blocking_sends else _sent_at_once(orders)


def forward_plan(stages: int, microbatches: int, chunks: int = 1, blocking_sends: bool = False) -> list[list[Action]]:
    """Each stage's actions where nothing is trained: evaluation, a reference model."""
    forwards: list[Compute] = [Forward(c, i) for c, i in _in_groups(stages, microbatches, chunks)]
    return _in_one_order([forwards] * stages) if blocking_sends else _sent_at_once([forwards] * stages)


def bubble_fraction(stages: int, microbatches: int, chunks: int = 1) -> float:
    """The fraction of a step in which a stage is idle, if transfers take no time and all chunks take the same.

    Every schedule here takes max(v m + p - 1, v p + m - 1) times the time of one chunk's forward and backward pass,
    whatever the ratio of the two, and v m of them are work. So for m >= p the bubble is (p - 1) / (v m + p - 1). Where
    sends wait for their receivers that holds if a backward pass is as long as a forward pass, and is a lower bound
    otherwise.
    """
    work = chunks * microbatches
    return 1 - work / max(work + stages - 1, chunks * stages + microbatches - 1)


def peak_live(schedule: str, stage: int, stages: int, microbatches: int, chunks: int = 1) -> int:
    """The largest number of chunks whose activations a stage stores at one time; each is 1 / v of the stage's layers.

    With groups of at most g microbatches, g = ceil(m / max(m // p, 1)) (that is p where p divides m):
    1f1b min(p - s, m); memory_efficient min(p - s + (v - 1) g, v m); interleaved min(2 (p - s) - 1 + (v - 1) g, v m).
    """
    return min(_warm_up(schedule, stage, stages, microbatches, chunks) + 1, chunks * microbatches)


def describe(schedule: str, microbatches: int, layers: Sequence[Sequence[Sequence[int]]]) -> str:
    """One line for the log. `layers[s][c]` are the layer numbers of chunk c of stage s."""
    stages, chunks = len(layers), len(layers[0])
    bubble = bubble_fraction(stages, microbatches, chunks)
    peaks = [peak_live(schedule, s, stages, microbatches, chunks) for s in range(stages)]
    shown = " | ".join("+".join(_layer_range(chunk) for chunk in of_stage) for of_stage in layers)
    return (
        f"pipeline: {schedule}, {count_of(stages, 'stage')} x {count_of(chunks, 'chunk')}, "
        f"{count_of(microbatches, 'microbatch', 'microbatches')}, bubble {bubble:.1%}, "
        f"at most {', '.join(map(str, peaks))} chunk activations stored; layers {shown}"
    )


def _layer_range(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _group_sizes(stages: int, microbatches: int) -> list[int]:
    """Sizes that differ by at most one, larger ones first: for a later, larger group the warm-up would be too short."""
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


def compute_order(schedule: str, stage: int, stages: int, microbatches: int, chunks: int = 1) -> list[Compute]:
    """The passes of one stage in the order of its actions, without transfers."""
    order = _in_groups(stages, microbatches, chunks)
    forwards: list[Compute] = [Forward(c, i) for c, i in order]
    backwards: list[Compute] = [Backward(chunks - 1 - c, i) for c, i in order]
    # Warm-up: forward passes only. Steady state: one forward, one backward. Cool-down: the remaining backward passes.
    warm_up = min(_warm_up(schedule, stage, stages, microbatches, chunks), len(order))
    steady = [action for pair in zip(forwards[warm_up:], backwards) for action in pair]
    return [*forwards[:warm_up], *steady, *backwards[len(order) - warm_up :]]


@dataclass(frozen=True)
class _Transfer:
    """The output of one stage's action, which the same action on the next chunk, on another stage, needs."""

    source: int
    made_by: Compute
    target: int
    used_by: Compute

    @property
    def what(self) -> Payload:
        return "activation" if isinstance(self.made_by, Forward) else "gradient"

    @property
    def send(self) -> Send:
        return Send(self.what, self.made_by.chunk, self.made_by.microbatch, self.target)

    @property
    def recv(self) -> Recv:
        return Recv(self.what, self.used_by.chunk, self.used_by.microbatch, self.source)


def _transfers(orders: list[list[Compute]]) -> list[_Transfer]:
    """All transfers of a step, those of one source in the order in which they are computed."""
    stages = len(orders)
    num_model_chunks = stages * (1 + max(action.chunk for action in orders[0]))
    transfers = []
    for stage, order in enumerate(orders):
        for action in order:
            # The model chunk that needs the output of this action: the next one forward, the previous one backward.
            model_chunk = action.chunk * stages + stage + (1 if isinstance(action, Forward) else -1)
            if 0 <= model_chunk < num_model_chunks:
                used_by = type(action)(model_chunk // stages, action.microbatch)
                transfers.append(_Transfer(stage, action, model_chunk % stages, used_by))
    return transfers


def _sent_at_once(orders: list[list[Compute]]) -> list[list[Action]]:
    """Each send follows its computation; each receive comes as late as its use and the order of sending allow."""
    transfers = _transfers(orders)
    sends = {(t.source, t.made_by): t.send for t in transfers}
    needs = {(t.target, t.used_by): t.recv for t in transfers}
    # The messages of each pair of stages in the order of sending. They arrive in this order, so a stage that needs a
    # later message must receive the earlier ones first.
    inbox: dict[tuple[int, int], deque[Recv]] = {(t.source, t.target): deque() for t in transfers}
    for transfer in transfers:
        inbox[transfer.source, transfer.target].append(transfer.recv)
    lists: list[list[Action]] = []
    for stage, order in enumerate(orders):
        actions: list[Action] = []
        arrived: set[Recv] = set()
        for action in order:
            need = needs.get((stage, action))
            while need is not None and need not in arrived:
                first = inbox[need.peer, stage].popleft()
                arrived.add(first)
                actions.append(first)
            actions.append(action)
            if (stage, action) in sends:
                actions.append(sends[stage, action])
        lists.append(actions)
    return lists


def _in_one_order(orders: list[list[Compute]]) -> list[list[Action]]:
    """Each stage's actions in one total order: by time, where a transfer has the time when its receiver needs it."""
    transfers, stages = _transfers(orders), len(orders)
    start = _unit_clock(orders, transfers)
    events: list[tuple[tuple[int, ...], list[tuple[int, Action]]]] = []
    for (stage, action), time in start.items():
        events.append(((time, 1, 0, stage), [(stage, action)]))
    for number, transfer in enumerate(transfers):
        source, target = transfer.source, transfer.target
        # At one time, links 0-1, 2-3, ... come before 1-2, 3-4, ...: no chain of stages waits for one another.
        link = min(source, target) if abs(source - target) == 1 else stages - 1
        key = (start[target, transfer.used_by], 0, link % 2, number)
        events.append((key, [(source, transfer.send), (target, transfer.recv)]))
    lists: list[list[Action]] = [[] for _ in orders]
    for _, actions in sorted(events, key=lambda event: event[0]):
        for stage, ordered in actions:
            lists[stage].append(ordered)
    return lists


def _unit_clock(orders: list[list[Compute]], transfers: list[_Transfer]) -> dict[tuple[int, Compute], int]:
    """When each stage starts each of its actions, if each takes one unit of time and transfers none."""
    producers = {(t.target, t.used_by): (t.source, t.made_by) for t in transfers}
    start: dict[tuple[int, Compute], int] = {}
    todo = [deque(order) for order in orders]
    free = [0] * len(orders)  # the time at which each stage finishes its last started action
    # Start every action whose input has been computed, until a round over all stages starts none.
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(todo):
            while order and ((producer := producers.get((stage, order[0]))) is None or producer in start):
                action, moved = order.popleft(), True
                time = max(free[stage], start[producer] + 1 if producer else 0)
                start[stage, action] = time
                free[stage] = time + 1
    assert not any(todo), "a stage waits for something that is never computed"
    return start
