"""What a plan says beyond one undisturbed step: the single change that saves most time, jitter over all ranks, failures
and how often to save.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from erniekit.plan.goodput import HOST_GB_S, LLAMA3_GPU_HOURS, Failures, Goodput, checkpoint_seconds, plan_goodput
from erniekit.plan.hardware import Hardware
from erniekit.plan.job import Job
from erniekit.plan.memory import MemoryPlan
from erniekit.plan.search import Plan
from erniekit.plan.simulate import Disturbance, simulate_step
from erniekit.plan.timing import StepTime, plan_time, step_time
from erniekit.plan.typed import read_keys, typed
from erniekit.utils.errors import UserError

JITTER = 0.02  # of an action on one rank: clocks, memory refresh, other processes of the host
_MOST_SIMULATED = 1024  # microbatches of a step: the clock of all ranks runs through each of them
_LEAST_GAIN = 0.01  # a change that saves less of a step is not worth a line


@dataclass(frozen=True)
class Faster:
    """A single change that fits and saves time."""

    keys: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Outlook:
    """`jitter`: the share of a step that jitter costs, None for a single rank; `checkpoint`: seconds for which saving
    stops the training; `goodput`: with checkpoints as often as is best.
    """

    time: StepTime
    faster: Faster | None
    jitter: float | None
    checkpoint: float
    goodput: Goodput
    save_steps: int

    def to_lines(self) -> list[str]:
        """For the terminal."""
        lines = []
        if self.faster is not None:
            saved = 1 - self.faster.seconds / self.time.seconds
            lines.append(f"saves most time: {typed(self.faster.keys)}: a step takes {saved:.0%} less")
        gpus = self.time.run.layout.gpus
        if self.jitter is not None:
            lines.append(
                f"with a jitter of {JITTER:.0%} on each of {gpus} ranks, all of which are simulated, a step takes "
                f"{self.jitter:.1%} longer"
            )
        goodput = self.goodput
        lines.append(
            f"save_steps={goodput.steps} is best, every {goodput.interval / 60:,.0f} minutes: a checkpoint stops the "
            f"training for {self.checkpoint:.1f} s (written in the background: use_async_save; else at "
            f"{HOST_GB_S:g} GB/s by each host)"
        )
        lines.append(
            f"failures: {goodput.failures_a_day:.2g} a day, {goodput.share:.1%} of the time makes progress (one in "
            f"{LLAMA3_GPU_HOURS:,.0f} hours of a GPU, as Llama 3 had; a restart takes 5 minutes)"
        )
        if self.save_steps > 3 * goodput.steps:
            lines.append(f"  save_steps={self.save_steps} repeats more work after a failure than is necessary")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        faster = self.faster
        return {
            "saves_most_time": None if faster is None else {"keys": faster.keys, "step_seconds": faster.seconds},
            "jitter": {"of_an_action": JITTER, "of_a_step": self.jitter},
            "checkpoint_seconds": self.checkpoint,
            "save_steps": self.goodput.steps,
            "goodput": self.goodput.share,
            "waste": self.goodput.waste,
            "failures_a_day": self.goodput.failures_a_day,
        }


def outlook(memory: MemoryPlan, time: StepTime, card: Hardware, plan: Plan) -> Outlook:
    """What lies beyond one step of a planned job. `plan`: the memory of a changed job."""
    job = memory.job
    stored = max(
        stage.parts.get("parameters", 0.0) + stage.parts.get("optimizer state", 0.0) for stage in memory.stages
    )
    stopped = checkpoint_seconds(
        stored, card, job.cfg.use_async_save, gpus_per_node=min(job.cluster.gpus_per_node, job.cluster.gpus)
    )
    jitter = _jitter(time, card) if job.cluster.gpus > 1 else None
    failures = Failures(detect=job.cfg.distributed_timeout)
    goodput = plan_goodput(job.cluster.gpus, time.seconds, stopped, failures)
    return Outlook(time, fastest_change(job, time, card, plan), jitter, stopped, goodput, job.cfg.save_steps)


def _jitter(time: StepTime, card: Hardware) -> float:
    """The share of a step that jitter costs; of a step of very many microbatches, that of one with fewer of them, but
    as many beyond a multiple of the stages.
    """
    layout = time.run.layout
    left_out = max(layout.microbatches - _MOST_SIMULATED, 0) // layout.pipeline * layout.pipeline
    if left_out:
        shorter = replace(layout, microbatches=layout.microbatches - left_out)
        time = step_time(replace(time.run, layout=shorter), card)
    return simulate_step(time, Disturbance(JITTER)).seconds / time.seconds - 1


def fastest_change(job: Job, time: StepTime, card: Hardware, plan: Plan) -> Faster | None:
    """The single change that fits and saves most time, if it saves any."""
    timed: list[tuple[float, dict[str, Any], Job]] = []
    for keys in (read_keys(job.cfg, each) for each in _changes(job)):
        try:
            changed = job.changed(**keys)
        except UserError:  # the degrees do not fit the cluster or the model
            continue
        timed.append((plan_time(changed, card).seconds, keys, changed))
    for seconds, keys, changed in sorted(timed, key=lambda entry: entry[0]):
        if seconds > time.seconds * (1 - _LEAST_GAIN):
            return None
        if plan(changed).fits:
            return Faster(keys, seconds)
    return None


def _changes(job: Job) -> Iterator[dict[str, Any]]:
    """Changes that may save time, with the global batch as it is."""
    cfg, degrees = job.cfg, job.degrees
    if cfg.recompute:
        yield {"recompute": False}
        for granularity in ("core_attn", "full_attn", "moe"):
            if granularity != cfg.recompute_granularity and (granularity != "moe" or job.model.moe_num_experts):
                yield {"recompute": True, "recompute_granularity": granularity}
    if job.num_microbatches % 2 == 0:
        yield {"batch_size": 2 * cfg.batch_size, "gradient_accumulation_steps": job.num_microbatches // 2}
    if degrees.pipeline > 1:
        yield {"virtual_pp_degree": 2 * job.num_chunks}
        yield {"pp_seg_method": "balanced"}
        if job.num_microbatches % 2 == 0:
            fewer = {"gradient_accumulation_steps": job.num_microbatches // 2, "data_parallel_degree": -1}
            yield {"pipeline_parallel_degree": degrees.pipeline // 2, "sharding_parallel_degree": -1, **fewer}
    if job.num_chunks > 1:
        yield {"virtual_pp_degree": 1}
    if degrees.tensor > 1 and not cfg.sequence_parallel:
        yield {"sequence_parallel": True}
    if degrees.expert > 1:
        yield {"expert_parallel_degree": degrees.expert // 2}
    if cfg.sharding == "stage2":
        yield {"sharding": "stage1"}
    if cfg.sharding == "stage3":
        yield {"sharding": "stage2"}
