"""The fastest layout of a run that fits a cluster: degrees, schedule, rows of a microbatch, recomputation and division
of the optimizer's state, with the global batch as it is.

Every layout has lower bounds of its time and of its memory, by formula. From the least bound of time on, the layouts
are planned in full (the pipeline's actions, the memory of every stage), until as many fit as are wanted and none that
is left can be faster than these: what is found is the fastest, and few layouts are planned.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from erniekit.plan.bounds import LayerOutline, LeastMemory
from erniekit.plan.hardware import Hardware
from erniekit.plan.job import Job
from erniekit.plan.layout import run_of
from erniekit.plan.memory import RESERVE, MemoryPlan
from erniekit.plan.timing import StepTime, least_seconds, step_time
from erniekit.plan.typed import changed, read_keys, typed
from erniekit.plan.work import Work, work_of
from erniekit.utils.errors import UserError

_DEGREES = ("tensor_parallel_degree", "pipeline_parallel_degree", "virtual_pp_degree", "expert_parallel_degree")
MAX_ROWS = 16  # of a microbatch
MAX_CHUNKS = 8  # of the model on a stage
# What saves memory for time, from the least to the most.
SAVING: tuple[dict[str, Any], ...] = (
    {"recompute": False, "offload_optim": False},
    {"recompute": True, "recompute_granularity": "core_attn", "offload_optim": False},
    {"recompute": True, "recompute_granularity": "full_attn", "offload_optim": False},
    {"recompute": True, "recompute_granularity": "full", "offload_optim": False},
    {"recompute": True, "recompute_granularity": "full", "offload_optim": True},
)
_ALWAYS = ("batch_size", "gradient_accumulation_steps", "recompute")
Plan = Callable[[Job], MemoryPlan]
# The same of some stages alone (None: of all).
StagePlan = Callable[[Job, Sequence[int] | None], MemoryPlan]
# Where a layout does not fit, these stages mostly show it.
_FIRST_STAGES = (0, 1)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: the keys as a user would write them, its plan, and what binds it."""

    keys: dict[str, Any]
    job: Job
    time: StepTime = field(repr=False)
    memory: MemoryPlan = field(repr=False)

    @property
    def binds(self) -> str:
        """What limits it: memory that leaves no room for less recomputation or more rows, or the largest share of the
        step that is not computation.
        """
        worst = self.memory.worst
        limits = [f"memory: {worst.headroom / 1e9:.1f} GB left on stage {worst.stage}"]
        seconds = self.time.seconds_by_kind
        waits = {kind: seconds[kind] for kind in _WAITS if kind in seconds}
        if waits:
            largest = max(waits, key=lambda kind: waits[kind])
            limits.append(f"{_WAITS[largest]}: {waits[largest] / self.time.seconds:.0%} of the step")
        return "; ".join(limits)


_WAITS = {
    "bubble": "pipeline bubble",
    "expert": "all-to-all of experts",
    "tensor": "tensor-parallel collectives",
    "data": "exchange of gradients and weights",
    "offload": "optimizer state in host memory",
    "recompute": "recomputation",
    "launches": "kernel launches",
}


@dataclass(frozen=True)
class Found:
    """What a search found: `fits`, the fastest first. `tried`: layouts that may fit by a lower bound of their memory;
    `faster`: one line for each faster layout that does not fit, with how much is missing and where.
    """

    fits: tuple[Candidate, ...]
    tried: int
    faster: tuple[str, ...]


def search(
    job: Job,
    card: Hardware,
    plan: StagePlan,
    wanted: int = 3,
    capacity: float | None = None,
    outline: LayerOutline | None = None,
) -> Found:
    """The `wanted` fastest layouts that fit.

    Args:
        job: its model, method, data and cluster stay; so does its global batch.
        card: what each rank has.
        plan: the memory of a job (plan/memory.py).
        wanted: how many are returned at most.
        capacity: bytes that a rank has for itself; None: the card's.
        outline: makes one layer of each kind, for the lower bounds of memory (plan/bounds.py).
    """
    work = work_of(job)  # the layouts change nothing in it
    capacity = card.memory_bytes if capacity is None else capacity
    least = LeastMemory(outline)
    timed = sorted(_timed(job, work, card, capacity, least), key=lambda entry: entry[0])
    memories = _Memories(plan, [(keys, candidate) for _, keys, candidate in timed])
    fits: dict[tuple, Candidate] = {}  # of the same degrees, the fastest
    faster: list[str] = []
    for bound, keys, candidate in timed:
        best = sorted(found.time.seconds for found in fits.values())[:wanted]
        if len(best) == wanted and bound >= best[-1]:
            break
        known = fits.get(_family(keys))
        if known is not None and bound >= known.time.seconds:
            continue
        if memories.excludes(keys):
            continue
        memory = memories.of(keys, candidate)
        if memory.fits:
            time = step_time(run_of(candidate, work), card)
            if known is None or time.seconds < known.time.seconds:
                fits[_family(keys)] = Candidate(keys, candidate, time, memory)
        elif not fits and len(faster) < wanted:
            worst = memory.worst
            faster.append(f"{words(job, keys)}: {-worst.headroom / 1e9:.1f} GB too much on stage {worst.stage}")
    found = sorted(fits.values(), key=lambda candidate: candidate.time.seconds)
    return Found(tuple(found[:wanted]), len(timed), tuple(faster))


class _Memories:
    """Memory plans of layouts. Of layouts that differ in the rows of a microbatch alone, the one with the fewest is
    planned first: where it does not fit, none does. (More recomputation is not always less memory, because an input may
    be kept that was not needed before.)
    """

    def __init__(self, plan: StagePlan, candidates: list[tuple[dict[str, Any], Job]]) -> None:
        self._plan = plan
        self._least: dict[tuple, tuple[int, Job]] = {}
        self._largest: dict[tuple, float] = {}  # rows of a microbatch from which on a layout is known not to fit
        for keys, job in candidates:
            rows, _ = self._least.get(_variant(keys), (None, None))
            if rows is None or keys["batch_size"] < rows:
                self._least[_variant(keys)] = keys["batch_size"], job

    def excludes(self, keys: dict[str, Any]) -> bool:
        """Whether it is known that a layout does not fit; plans that with the fewest rows if nothing is known."""
        variant = _variant(keys)
        if variant not in self._largest:
            rows, least = self._least[variant]
            self._largest[variant] = math.inf
            if keys["batch_size"] > rows and not self._made(least).fits:
                self._largest[variant] = rows
        return keys["batch_size"] >= self._largest[variant]

    def of(self, keys: dict[str, Any], job: Job) -> MemoryPlan:
        """The plan of a layout."""
        memory = self._made(job)
        if not memory.fits:
            variant = _variant(keys)
            self._largest[variant] = min(self._largest[variant], keys["batch_size"])
        return memory

    def _made(self, job: Job) -> MemoryPlan:
        if job.degrees.pipeline > len(_FIRST_STAGES):
            first = self._plan(job, _FIRST_STAGES)
            if not first.fits:
                return first
        return self._plan(job, None)


def words(job: Job, keys: dict[str, Any]) -> str:
    """What has to be typed to get this layout of the job: every key that differs from it, and those that a reader
    compares layouts by.
    """
    different = changed(job.cfg, keys)
    shown = {name: value for name, value in keys.items() if name in different or name in _ALWAYS}
    return typed(read_keys(job.cfg, shown))


def _timed(
    job: Job, work: Work, card: Hardware, capacity: float, least: LeastMemory
) -> Iterator[tuple[float, dict[str, Any], Job]]:
    """(seconds, keys, job) of every layout that the configuration accepts and that may fit."""
    for keys in layouts(job):
        try:
            candidate = job.changed(**keys)
        except UserError:  # the degrees do not divide the cluster or the model
            continue
        run = run_of(candidate, work)
        if least.of(candidate, run) <= capacity * (1 - RESERVE):
            yield least_seconds(run, card), keys, candidate


def layouts(job: Job) -> Iterator[dict[str, Any]]:
    """The keys of every layout of the cluster whose degrees divide the model and the batch."""
    gpus, model = job.cluster.gpus, job.model
    rows = job.cfg.batch_size * job.num_microbatches * job.degrees.batch  # of a step
    for tensor in _divisors(gpus, job.cluster.gpus_per_node):
        if model.num_key_value_heads % tensor:
            continue
        for pipeline in _divisors(gpus // tensor, model.num_hidden_layers):
            data = gpus // tensor // pipeline
            batch, rest = divmod(data, job.degrees.context)
            if rest or rows % batch:
                continue
            for degrees in _degrees(job, tensor, pipeline, data):
                yield from _batches(degrees, rows // batch, bool(model.moe_num_experts))


def _degrees(job: Job, tensor: int, pipeline: int, data: int) -> Iterator[dict[str, Any]]:
    model = job.model
    experts = [n for n in _divisors(data, model.moe_num_experts) if model.moe_num_experts % (n * tensor) == 0]
    max_chunks = min(MAX_CHUNKS, model.num_hidden_layers // pipeline) if pipeline > 1 else 1
    for expert in experts if model.moe_num_experts else [1]:
        for chunks in _powers(max_chunks):
            yield {
                "tensor_parallel_degree": tensor,
                "sequence_parallel": tensor > 1,
                "pipeline_parallel_degree": pipeline,
                "virtual_pp_degree": chunks,
                "pp_seg_method": "balanced" if pipeline > 1 else "layer:DecoderLayer",
                "pipeline_schedule": "1f1b",
                "expert_parallel_degree": expert,
                "data_parallel_degree": -1,
                "sharding_parallel_degree": -1,
                "sharding": "stage1" if data > 1 else "",
                "no_recompute_layers": (),
            }


def _batches(degrees: dict[str, Any], rows: int, sparse: bool) -> Iterator[dict[str, Any]]:
    """Rows of a microbatch and recomputation; `rows`: of a step on one data rank."""
    for batch in _powers(min(rows, MAX_ROWS)):
        if rows % batch or rows // batch < degrees["pipeline_parallel_degree"]:
            continue
        for saving in SAVING:
            yield {**degrees, "batch_size": batch, "gradient_accumulation_steps": rows // batch, **saving}


def _level(keys: dict[str, Any]) -> int:
    return next(place for place, level in enumerate(SAVING) if level.items() <= keys.items())


def _family(keys: dict[str, Any]) -> tuple:
    """What layouts share that differ in the microbatch and in recomputation alone."""
    return tuple(keys[name] for name in _DEGREES)


def _variant(keys: dict[str, Any]) -> tuple:
    """What layouts share that differ in the rows of a microbatch alone."""
    return *_family(keys), _level(keys)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, max(most, 1)) + 1) if number % n == 0]


def _powers(most: int) -> list[int]:
    return [1 << bit for bit in range(max(most, 1).bit_length())]
