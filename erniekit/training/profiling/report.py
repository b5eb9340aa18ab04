"""A profile as a table and as a trace."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from erniekit.training.profiling.recorder import (
    BACKWARD,
    COMMUNICATION,
    DATA,
    FORWARD,
    OPTIMIZER,
    RECOMPUTE,
    Interval,
)

PASSES = (FORWARD, RECOMPUTE, BACKWARD)
# What a rank's time is divided into, in the order in which it is shown. Sums and norms of gradients belong to the
# optimizer; everything else is work of the host.
KINDS = (*PASSES, OPTIMIZER, COMMUNICATION, DATA, "host")


@dataclass(frozen=True)
class RankTimes:
    """What one rank measured: `origin` is the epoch's time of the first interval's start, `peak_bytes` of tensors,
    `sent` bytes by kind of collective.
    """

    rank: int
    origin: float
    intervals: list[Interval]
    peak_bytes: int
    sent: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists and dicts."""
        return asdict(self) | {"intervals": [list(vars(interval).values()) for interval in self.intervals]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "RankTimes":
        """The inverse."""
        return cls(**(fields | {"intervals": [Interval(*values) for values in fields["intervals"]]}))

    @property
    def seconds(self) -> float:
        """The time of all intervals."""
        return sum(interval.seconds for interval in self.intervals)

    @property
    def last_step(self) -> float:
        """The start of the last step, which begins by waiting for data."""
        return max((interval.start for interval in self.intervals if interval.phase == DATA), default=0.0)


@dataclass(frozen=True)
class Profile:
    """What all ranks measured over some steps; `tokens` of each step. `on_device`: by the clock of a GPU, which may be
    behind the host's.
    """

    ranks: list[RankTimes]
    tokens: list[int]
    on_device: bool

    @property
    def num_steps(self) -> int:
        return len(self.tokens)

    @property
    def step_seconds(self) -> float:
        """The mean time of a step on the slowest rank."""
        return max(rank.seconds for rank in self.ranks) / self.num_steps

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second of all ranks together."""
        return sum(self.tokens) / self.num_steps / self.step_seconds


def kind_of(interval: Interval) -> str:
    """One of KINDS."""
    if interval.phase == "gradients":
        return OPTIMIZER
    return interval.phase if interval.phase in KINDS else "host"


def by_part(profile: Profile) -> dict[str, dict[str, float]]:
    """Seconds a step and rank by part and phase ("attention" -> {"forward": ..., "backward": ...}), the largest first;
    outside of the passes a part is a phase.
    """
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    share = profile.num_steps * len(profile.ranks)
    for interval in _all(profile):
        if interval.phase == COMMUNICATION:
            times[f"communication: {interval.name}"][COMMUNICATION] += interval.seconds / share
        elif interval.phase in PASSES:
            times[interval.name][interval.phase] += interval.seconds / share
        else:
            times[_OTHERS.get(interval.phase, interval.name)][interval.phase] += interval.seconds / share
    return dict(sorted(times.items(), key=lambda entry: -sum(entry[1].values())))


_OTHERS = {
    DATA: "waiting for data",
    OPTIMIZER: "optimizer, clipping",
    "gradients": "gradients: fold, norm, read",
    "prepare": "reference model, batches",
    "inputs": "inputs: positions, masks",
    "host": "host: between the parts",
}


def by_rank(profile: Profile) -> dict[int, dict[str, float]]:
    """Seconds a step of each rank by kind."""
    result = {}
    for rank in profile.ranks:
        times = dict.fromkeys(KINDS, 0.0)
        for interval in rank.intervals:
            times[kind_of(interval)] += interval.seconds / profile.num_steps
        result[rank.rank] = times
    return result


def table(profile: Profile) -> str:
    """The profile as text: the parts, then the ranks, then the step."""
    lines = [*_parts_table(profile), "", *_ranks_table(profile), "", *summary(profile)]
    return "\n".join(lines)


def summary(profile: Profile) -> list[str]:
    """Lines about the whole step."""
    tokens = sum(profile.tokens) / profile.num_steps
    where = "measured on the GPU by events" if profile.on_device else "measured on a CPU"
    return [
        f"step: {profile.step_seconds * 1e3:.1f} ms, {tokens:.0f} tokens, {profile.tokens_per_second:.0f} tokens/s; "
        f"{where}, mean of {profile.num_steps} steps"
    ]


def _parts_table(profile: Profile) -> list[str]:
    parts = by_part(profile)
    total = sum(sum(times.values()) for times in parts.values())
    shown = [phase for phase in PASSES if any(phase in times for times in parts.values())]
    width = max(len(name) for name in [*parts, "part"])
    lines = [_row("part", width, [*shown, "ms a step", "share"])]
    for name, times in parts.items():
        numbers = [f"{times[phase] * 1e3:.1f}" if phase in times else "" for phase in shown]
        part = sum(times.values())
        lines.append(_row(name, width, [*numbers, f"{part * 1e3:.1f}", f"{part / total:.1%}"]))
    sums = [sum(times.get(phase, 0.0) for times in parts.values()) for phase in shown]
    lines.append(_row("all", width, [*(f"{x * 1e3:.1f}" for x in sums), f"{total * 1e3:.1f}", "100.0%"]))
    return lines


def _ranks_table(profile: Profile) -> list[str]:
    lines = [_row("rank", 6, [*KINDS, "step, ms"])]
    for rank, times in by_rank(profile).items():
        lines.append(_row(str(rank), 6, [f"{x * 1e3:.1f}" for x in (*times.values(), sum(times.values()))]))
    return lines


def _row(name: str, width: int, numbers: Sequence[str]) -> str:
    return (f"{name:<{width}}" + "".join(f"  {number:>13}" for number in numbers)).rstrip()


def trace(profile: Profile) -> str:
    """The intervals in Chrome's trace format: a process for each rank, with a row for kinds and one for parts."""
    first = min(rank.origin for rank in profile.ranks)
    events: list[dict[str, Any]] = []
    for rank in profile.ranks:
        events.append(_named("process_name", rank.rank, 0, f"rank {rank.rank}"))
        events += [_named("thread_name", rank.rank, row, text) for row, text in enumerate(("kinds", "parts"))]
        begin = rank.origin - first
        for kind, start, end in kinds_in_order(rank.intervals):
            events.append(_event(kind, kind, rank.rank, 0, begin + start, end - start))
        for interval in rank.intervals:
            name = interval.name if interval.layer < 0 else f"{interval.name} {interval.layer}"
            event = _event(name, kind_of(interval), rank.rank, 1, begin + interval.start, interval.seconds)
            event["args"] = {"phase": interval.phase, "host_ms": round(interval.host * 1e3, 3)}
            events.append(event)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def kinds_in_order(intervals: Iterable[Interval]) -> list[tuple[str, float, float]]:
    """(kind, start, end) of neighbouring intervals of one kind as one."""
    merged: list[tuple[str, float, float]] = []
    for interval in intervals:
        kind, end = kind_of(interval), interval.start + interval.seconds
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1], end)
        else:
            merged.append((kind, interval.start, end))
    return merged


def _event(name: str, category: str, rank: int, row: int, start: float, seconds: float) -> dict[str, Any]:
    times = {"ts": round(start * 1e6, 3), "dur": round(seconds * 1e6, 3)}
    return {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": row, **times}


def _named(what: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def _all(profile: Profile) -> Iterable[Interval]:
    return (interval for rank in profile.ranks for interval in rank.intervals)
