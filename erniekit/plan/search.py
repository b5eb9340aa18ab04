"""The fastest layout of a run that fits a cluster: degrees, schedule, rows of a microbatch, recomputation and division
of the optimizer's state, with the global batch as it is.

All layouts are timed by formula; from the fastest on, their memory is planned until enough of them fit. What is more
costly to plan (memory of every stage, the pipeline's actions) is so computed for few of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from erniekit.parallel.buckets import item_bytes
from erniekit.parallel.memory import gradient_bytes, state_bytes
from erniekit.plan.collectives import trained_entries
from erniekit.plan.hardware import Hardware
from erniekit.plan.job import Job
from erniekit.plan.layout import Run, run_of
from erniekit.plan.memory import MemoryPlan
from erniekit.plan.timing import StepTime, estimate_seconds, step_time
from erniekit.plan.typed import changed, typed
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
MOST_PLANNED = 200  # memory plans of one search

Plan = Callable[[Job], MemoryPlan]


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
    """What a search found: `fits`, the fastest first. `tried`: layouts that were timed; `faster`: one line for each
    faster layout that does not fit, with how much is missing and where.
    """

    fits: tuple[Candidate, ...]
    tried: int
    faster: tuple[str, ...]


def search(job: Job, card: Hardware, plan: Plan, wanted: int = 3) -> Found:
    """The `wanted` fastest layouts that fit.

    Args:
        job: its model, method, data and cluster stay; so does its global batch.
        card: what each rank has.
        plan: the memory of a job (plan/memory.py).
        wanted: how many are returned at most.
    """
    work = work_of(job)  # the layouts change nothing in it
    timed = sorted(_timed(job, work, card), key=lambda entry: entry[0])
    families: dict[tuple, list[dict[str, Any]]] = {}
    for _, keys, _ in timed:
        families.setdefault(_family(keys), []).append(keys)
    memories = _Memories(job, plan, families)
    fits: list[Candidate] = []
    faster: list[str] = []
    for estimate, keys, candidate in timed:
        # The estimate is a lower bound, because it does not know what ranks wait for one another's messages.
        best = sorted(found.time.seconds for found in fits)[:wanted]
        if (len(best) == wanted and estimate >= best[-1]) or memories.planned >= MOST_PLANNED:
            break
        if any(_family(keys) == _family(known.keys) for known in fits):
            continue  # the same degrees are listed once, with what makes them fastest
        memory = memories.of(keys, candidate)
        if memory is None:
            continue
        if memory.fits:
            fits.append(Candidate(keys, candidate, step_time(run_of(candidate, work), card), memory))
        elif not fits and len(faster) < wanted:
            worst = memory.worst
            faster.append(f"{words(job, keys)}: {-worst.headroom / 1e9:.1f} GB too much on stage {worst.stage}")
    fits.sort(key=lambda found: found.time.seconds)
    return Found(tuple(fits[:wanted]), len(timed), tuple(faster))


class _Memories:
    """Memory plans of layouts, without those whose outcome is known: where the variant of the same degrees with the
    least memory does not fit, none does.
    """

    def __init__(self, job: Job, plan: Plan, families: dict[tuple, list[dict[str, Any]]]) -> None:
        self._job, self._plan, self._families = job, plan, families
        self._possible: dict[tuple, bool] = {}
        self._refused: list[dict[str, Any]] = []
        self.planned = 0

    def of(self, keys: dict[str, Any], job: Job) -> MemoryPlan | None:
        """The plan, or None for a layout that cannot fit."""
        family = _family(keys)
        if family not in self._possible:
            least = min(self._families[family], key=lambda variant: (variant["batch_size"], -_level(variant)))
            self._possible[family] = self._made(self._job.changed(**least)).fits
        if not self._possible[family] or any(_needs_more(keys, refused) for refused in self._refused):
            return None
        memory = self._made(job)
        if not memory.fits:
            self._refused.append(keys)
        return memory

    def _made(self, job: Job) -> MemoryPlan:
        self.planned += 1
        return self._plan(job)


def words(job: Job, keys: dict[str, Any]) -> str:
    """What has to be typed to get this layout of the job: every key that differs from it, and those that a reader
    compares layouts by.
    """
    different = changed(job.cfg, keys)
    return typed({name: value for name, value in keys.items() if name in different or name in _ALWAYS})


def _timed(job: Job, work: Work, card: Hardware) -> Iterator[tuple[float, dict[str, Any], Job]]:
    """(seconds, keys, job) of every layout that the configuration accepts."""
    for keys in layouts(job):
        try:
            candidate = job.changed(**keys)
        except UserError:  # the degrees do not divide the cluster or the model
            continue
        run = run_of(candidate, work)
        if _least_bytes(run) < card.memory_bytes:
            yield estimate_seconds(run, card), keys, candidate


def _least_bytes(run: Run) -> float:
    """What the fullest stage stores of trained weights, gradients and state; a lower bound of its memory."""
    layout = run.layout
    sizes = []
    for stage in range(layout.pipeline):
        entries = trained_entries(run.stage(stage), layout)
        weights = sum(entry.size * item_bytes(entry.dtype) for entry in entries)
        gradients = gradient_bytes(entries, layout.zero_stage, layout.gradient_bytes == 4)
        sizes.append(weights + gradients + (0 if layout.offload_optimizer else state_bytes(entries)))
    return max(sizes)


def layouts(job: Job) -> Iterator[dict[str, Any]]:
    """The keys of every layout of the cluster whose degrees divide the model and the batch."""
    gpus, model = job.cluster.gpus, job.model
    rows = job.cfg.batch_size * job.num_microbatches * job.degrees.data  # of a step
    for tensor in _divisors(gpus, job.cluster.gpus_per_node):
        if model.num_key_value_heads % tensor:
            continue
        for pipeline in _divisors(gpus // tensor, model.num_hidden_layers):
            data = gpus // tensor // pipeline
            if rows % data:
                continue
            for degrees in _degrees(job, tensor, pipeline, data):
                yield from _batches(degrees, rows // data, bool(model.moe_num_experts))


def _degrees(job: Job, tensor: int, pipeline: int, data: int) -> Iterator[dict[str, Any]]:
    model = job.model
    experts = [n for n in _divisors(data, model.moe_num_experts) if model.moe_num_experts % (n * tensor) == 0]
    most_chunks = min(MAX_CHUNKS, model.num_hidden_layers // pipeline) if pipeline > 1 else 1
    for expert in experts if model.moe_num_experts else [1]:
        for chunks in _powers(most_chunks):
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


def _needs_more(keys: dict[str, Any], refused: dict[str, Any]) -> bool:
    """Whether a layout needs at least the memory of one that does not fit: the same degrees, as many rows or more, as
    much recomputation or less.
    """
    return (
        _family(keys) == _family(refused)
        and keys["batch_size"] >= refused["batch_size"]
        and _level(keys) <= _level(refused)
    )


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, max(most, 1)) + 1) if number % n == 0]


def _powers(most: int) -> list[int]:
    return [1 << bit for bit in range(max(most, 1).bit_length())]
