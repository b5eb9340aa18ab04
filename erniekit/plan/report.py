"""A plan as text for one screen, and as the values of a JSON file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from erniekit.models.weights import num_parameters
from erniekit.plan.advice import MAX_GPUS, Change
from erniekit.plan.job import Job
from erniekit.plan.launches import launches_of
from erniekit.plan.memory import RESERVE, MemoryPlan, StageMemory
from erniekit.plan.search import Found, words
from erniekit.plan.timing import StepTime
from erniekit.plan.typed import differences, typed

_MAX_ROWS = 12
_COLUMNS = ("parameters", "gradients", "optimizer state", "activations")


@dataclass(frozen=True)
class Report:
    """What `erniekit plan` says. `time`: None where it is not planned; `saving`, `cure`: see plan/advice.py; `least`:
    the fewest GPUs on which a plan that does not fit would; `tokens`: of the whole training; `assumptions`: lines;
    `found`: the fastest layouts that fit, where they were searched.
    """

    memory: MemoryPlan
    time: StepTime | None
    saving: Change | None
    cure: Change | None
    least: MemoryPlan | None
    tokens: float | None
    assumptions: Sequence[str]
    found: Found | None = None

    @property
    def job(self) -> Job:
        """What is planned."""
        return self.memory.job

    def to_text(self) -> str:
        """For the terminal."""
        lines = [*_headline(self.job), "", _verdict(self.memory), "", *_table(self.memory), ""]
        lines += _largest(self.memory.worst)
        host = max(stage.host_bytes for stage in self.memory.stages) * self.job.cluster.gpus_per_node
        if host:
            lines.append(f"host memory for what is offloaded: up to {gigabytes(host)} of each host")
        lines += self._advice()
        if self.time is not None:
            lines += ["", *_time(self.time, self.tokens), *_launches(self.job)]
        if self.found is not None:
            lines += ["", *_found(self.found, self.job)]
        return "\n".join([*lines, "", "assumptions:", *(f"  {line}" for line in self.assumptions)])

    def _advice(self) -> list[str]:
        lines = []
        is_cure = self.saving is not None and self.cure is not None and self.saving.keys == self.cure.keys
        if self.saving is not None and (self.memory.fits or not is_cure):
            lines.append(f"saves most memory: {self._effect(self.saving)}")
        if self.memory.fits:
            return lines
        if self.cure is not None:
            lines.append(f"fits at the least cost with: {self._effect(self.cure)}")
        elif self.least is not None:
            lines.append(f"no single change makes it fit; {layout_text(self.job, self.least)}")
        else:
            lines.append(
                "no single change makes it fit, and no cluster of up to "
                f"{MAX_GPUS:,} of these was found on which it does"
            )
        return lines

    def _effect(self, change: Change) -> str:
        worst = change.plan.worst
        effect = f"{change.text}: {gigabytes(worst.peak)} on the fullest stage"
        if not self.memory.fits:
            effect += ", which fits" if change.plan.fits else f", still {gigabytes(-worst.headroom)} too much"
        if change.seconds is not None and self.time is not None:
            effect += f"; a step takes {change.seconds / self.time.seconds - 1:+.0%} time"
        return effect

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        job = self.job
        values: dict[str, Any] = {
            "gpu": job.cluster.gpu,
            "gpus": job.cluster.gpus,
            "gpus_per_node": job.cluster.gpus_per_node,
            "parameters": num_parameters(job.model),
            "degrees": {**vars(job.degrees)},
            "fits": self.memory.fits,
            "stages": [_stage_values(stage) for stage in self.memory.stages],
            "assumptions": list(self.assumptions),
        }
        for name, change in (("saves_most_memory", self.saving), ("cheapest_fit", self.cure)):
            if change is not None:
                values[name] = {
                    "keys": change.keys,
                    "peak_bytes": round(change.plan.worst.peak),
                    "fits": change.plan.fits,
                    "step_seconds": change.seconds,
                }
        if self.found is not None:
            values["search"] = [
                {
                    "keys": each.keys,
                    "step_seconds": each.time.seconds,
                    "tokens_per_second_per_gpu": each.time.tokens_per_second_per_gpu,
                    "mfu": each.time.mfu(),
                    "peak_bytes": round(each.memory.worst.peak),
                    "headroom": each.memory.worst.headroom,
                    "binds": each.binds,
                }
                for each in self.found.fits
            ]
        if self.least is not None:
            least = self.least.job
            values["least_cluster"] = {
                "gpus": least.cluster.gpus,
                "degrees": {**vars(least.degrees)},
                "keys": differences(job.cfg, least.cfg),
            }
        if not job.on_cpu and job.model.vision is None:
            values["launches"] = {**vars(launches_of(job))}
        return values | ({} if self.time is None else _time_values(self.time, self.tokens))


def gigabytes(size: float) -> str:
    """Bytes as text, in units of 10^9 bytes, or smaller ones."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def layout_text(job: Job, plan: MemoryPlan) -> str:
    """The layout on which a run would fit, as every key that the job has to change."""
    keys = {"gpus": plan.job.cluster.gpus} | differences(job.cfg, plan.job.cfg)
    return f"the fewest that hold it: {typed(keys)} ({gigabytes(plan.worst.peak)} on the fullest stage)"


def _headline(job: Job) -> list[str]:
    cluster, degrees, cfg = job.cluster, job.degrees, job.cfg
    devices = f"{cluster.gpus} x {cluster.gpu}"
    hosts = f" in {cluster.nodes} hosts" if cluster.nodes > 1 else ""
    name = cfg.model_name_or_path or "a model of the YAML's shape"
    experts = f", experts over {degrees.expert}" if degrees.expert > 1 else ""
    experts += f", rows shared by {degrees.context} data ranks" if degrees.context > 1 else ""
    count = num_parameters(job.model)
    size = f"{count / 1e9:.2f} B parameters" if count >= 1e8 else f"{count / 1e6:.2f} M parameters"
    return [
        f"{name}: {size}, {cfg.fine_tuning} {cfg.stage}, {cfg.compute_type}",
        f"{devices}{hosts}: {degrees.describe()}{experts}; a microbatch has {cfg.batch_size} x {job.row_tokens} "
        f"tokens, a step {job.step_tokens:,}",
    ]


def _verdict(plan: MemoryPlan) -> str:
    worst = plan.worst
    has_stages = len(plan.stages) > 1
    where = f"stage {worst.stage}" if has_stages else "each rank"
    of = f"{gigabytes(worst.usable)} ({gigabytes(worst.capacity)} less {RESERVE:.0%})"
    if plan.fits:
        left = "the least left: " if has_stages else ""
        return f"FITS: {where} has {left}{gigabytes(worst.headroom)} of {of}{'' if has_stages else ' left'}"
    return f"DOES NOT FIT: {where} needs {gigabytes(worst.peak)} of {of}: {gigabytes(-worst.headroom)} too much"


def _table(plan: MemoryPlan) -> list[str]:
    stages = list(plan.stages)
    if len(stages) > _MAX_ROWS:
        shown = {*range(_MAX_ROWS - 3), plan.worst.stage, len(stages) - 2, len(stages) - 1}
        stages = [stage for stage in stages if stage.stage in shown]
    head = f"{'stage':>5} {'layers':>12} {'weights':>10} {'gradients':>10} {'state':>10} {'activ.':>10} {'other':>10}"
    lines = [head + f" {'peak':>10} {'left':>10}   in flight"]
    for stage in stages:
        sizes = [stage.parts.get(name, 0.0) for name in _COLUMNS]
        cells = [*sizes, stage.peak - sum(sizes), stage.peak, stage.headroom]
        layers = stage.layers
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        span += f" ({len(layers)})" if len(plan.job.stages[stage.stage]) > 1 else ""
        row = " ".join(f"{gigabytes(cell):>10}" for cell in cells)
        mark = " <" if stage is plan.worst and len(plan.stages) > 1 else ""
        lines.append(f"{stage.stage:>5} {span:>12} {row}   {stage.activations.live_chunks}{mark}")
    return lines


def _largest(stage: StageMemory) -> list[str]:
    items = "; ".join(f"{name} {gigabytes(size)}" for name, size in stage.items[:3])
    return [f"largest on stage {stage.stage}: {items}"]


def _time(time: StepTime, tokens: float | None) -> list[str]:
    spent = time.seconds_by_kind
    shares = ", ".join(f"{kind} {seconds / time.seconds:.0%}" for kind, seconds in list(spent.items())[:7])
    lines = [
        f"a step takes {_duration(time.seconds)}: {time.tokens_per_second:,.0f} tokens/s, "
        f"{time.tokens_per_second_per_gpu:,.0f} for each GPU; MFU {time.mfu():.1%} with the causal half of attention, "
        f"{time.mfu('full'):.1%} with the full square; bubble {time.bubble:.1%}",
        f"where it goes on stage {time.slowest}: {shares}",
    ]
    if tokens:
        lines.append(
            f"{tokens:,.0f} tokens take {time.days(tokens):,.1f} days, {time.gpu_hours(tokens):,.0f} GPU-hours, "
            "without failures"
        )
    return lines


def _launches(job: Job) -> list[str]:
    """What the host starts in a step; the formula is that of text models on a GPU."""
    if job.on_cpu or job.model.vision is not None:
        return []
    found = launches_of(job)
    return [
        f"a step starts {found.kernels:,} kernels with {found.calls:,} calls of operators, by formula, on the rank "
        "that has most (collectives come on top)"
    ]


def _found(found: Found, job: Job) -> list[str]:
    if not found.fits:
        return [
            f"search: none of {found.tried:,} layouts of {job.cluster.gpus} x {job.cluster.gpu} fits",
            *found.faster,
        ]
    lines = [
        f"search: the fastest layouts that fit, of {found.tried:,} that may by a lower bound of their memory, with "
        f"{job.step_tokens:,} tokens a step"
    ]
    for number, candidate in enumerate(found.fits, 1):
        lines.append(
            f"  {number}. {words(job, candidate.keys)}: {_duration(candidate.time.seconds)} a step, "
            f"{candidate.time.tokens_per_second_per_gpu:,.0f} tokens/s for each GPU, MFU {candidate.time.mfu():.1%}"
        )
        lines.append(f"     {candidate.binds}")
    return [*lines, *(f"  faster, but {line}" for line in found.faster)]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _stage_values(stage: StageMemory) -> dict[str, Any]:
    tensors = stage.tensors
    return {
        "stage": stage.stage,
        "layers": list(stage.layers),
        "bytes": {name: round(size) for name, size in stage.parts.items()},
        "weights": dict(tensors.weights),
        "activations": {name: round(size) for name, size in stage.activations.by_kind.items()},
        "chunks_in_flight": stage.activations.live_chunks,
        "host_bytes": stage.host_bytes,
        "trained_parameters": tensors.trained,
        "parameters": tensors.total,
        "peak": round(stage.peak),
        "capacity": round(stage.capacity),
        "headroom": round(stage.headroom),
    }


def _time_values(time: StepTime, tokens: float | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step_seconds": time.seconds,
        "seconds": time.seconds_by_kind,
        "bubble": time.bubble,
        "tokens_per_second": time.tokens_per_second,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "flops_per_token": {"causal": time.flops.causal, "full": time.flops.full, "recomputed": time.flops.recomputed},
        "mfu": {"causal": time.mfu(), "full": time.mfu("full")},
        "hfu": time.hfu,
    }
    if tokens:
        values |= {"tokens": tokens, "days": time.days(tokens), "gpu_hours": time.gpu_hours(tokens)}
    return values
