"""The memory of every stage's ranks against that of the device: what there is of each kind, what is left, and which
stage has the least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from erniekit.models.decoder import CausalLM
from erniekit.parallel.buckets import Bucket, item_bytes
from erniekit.parallel.grad_sync import IN_FLIGHT
from erniekit.parallel.mesh import Mesh, rank_lists
from erniekit.plan.activations import StageActivations, stage_activations, teacher_bytes
from erniekit.plan.job import Job
from erniekit.plan.operations import FP32
from erniekit.plan.tensors import RankTensors, rank_tensors

# What a plan leaves free of a device: its context, the workspaces of kernels, and blocks that the allocator cannot use.
RESERVE = 0.1
# Buffers of one NCCL communicator; a rank has one for each distinct group that it is in.
COMMUNICATOR_BYTES = 256 * 2**20

# Makes the model of a stage's first rank without memory, and that rank: training/outline.py.
Outline = Callable[[Job, int], tuple[CausalLM, Mesh]]


@dataclass(frozen=True)
class StageMemory:
    """The peak of each rank of a stage, in bytes. `parts` adds up to it; `capacity` is the device's, of which `reserve`
    stays free.
    """

    stage: int
    layers: tuple[int, ...]
    tensors: RankTensors
    activations: StageActivations
    parts: dict[str, float]
    capacity: float

    @property
    def peak(self) -> float:
        """The most that a rank needs at one time."""
        return sum(self.parts.values())

    @property
    def usable(self) -> float:
        """What a plan may use of the device."""
        return self.capacity * (1 - RESERVE)

    @property
    def headroom(self) -> float:
        """What is left of that; negative where the plan does not fit."""
        return self.usable - self.peak

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory of each rank: optimizer state and inputs of recomputed modules that wait there."""
        return self.tensors.offloaded + round(self.activations.on_host)

    @property
    def items(self) -> list[tuple[str, float]]:
        """The items that make up the peak, the largest first: weights and activations by part of the model."""
        whole = ("parameters", "activations")
        found = {kind: size for kind, size in self.parts.items() if kind not in whole}
        found |= {f"parameters: {part}": float(size) for part, size in self.tensors.weights.items()}
        found |= {f"activations: {kind}": size for kind, size in self.activations.by_kind.items()}
        return sorted(found.items(), key=lambda item: -item[1])


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of all stages of a job."""

    job: Job
    stages: tuple[StageMemory, ...]

    @cached_property
    def worst(self) -> StageMemory:
        """The stage with the least headroom."""
        return min(self.stages, key=lambda stage: stage.headroom)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.worst.headroom >= 0


def plan_memory(job: Job, capacity: float, outline: Outline, stages: Sequence[int] | None = None) -> MemoryPlan:
    """Plan the memory of a job.

    Args:
        job: what is planned.
        capacity: bytes of a device that one rank has for itself.
        outline: makes the models of the stages.
        stages: those that are planned; None: all.
    """
    numbers = range(job.degrees.pipeline) if stages is None else stages
    counted: dict[int, RankTensors] = {}  # stages may share an outline
    planned = []
    for stage in numbers:
        model, mesh = outline(job, stage)
        if id(model) not in counted:
            counted[id(model)] = rank_tensors(job, mesh, model)
        activations, states = stage_activations(job, model, stage), teacher_bytes(job, model)
        planned.append(_stage(job, stage, capacity, counted[id(model)], activations, mesh, states))
    return MemoryPlan(job, tuple(planned))


def _stage(
    job: Job,
    stage: int,
    capacity: float,
    tensors: RankTensors,
    activations: StageActivations,
    mesh: Mesh,
    teacher_states: float,
) -> StageMemory:
    exchanged, kept = _exchange(job, tensors)
    parts = {
        "parameters": float(tensors.parameters),
        "gradients": float(tensors.gradients),
        "optimizer state": float(tensors.state),
        "reference model": float(tensors.reference),
        "states of the teacher": teacher_states,
        "average of weights": float(tensors.average),
        "base of adapters": float(tensors.copies),
        # Gradients are exchanged, and parameters gathered, when no activations are left.
        "activations": activations.peak,
        "exchange": kept + max(exchanged - activations.peak, 0.0),
        "communicators": 0.0 if job.on_cpu else float(COMMUNICATOR_BYTES * _communicators(mesh)),
    }
    layers = tuple(layer for chunk in job.stages[stage] for layer in chunk)
    return StageMemory(stage, layers, tensors, activations, {k: v for k, v in parts.items() if v}, capacity)


def _exchange(job: Job, tensors: RankTensors) -> tuple[float, float]:
    """Bytes that the exchange of gradients and parameters takes when all backward passes are done, and bytes that it
    takes during them: in ZeRO stages 2 and 3, and where buckets are sent while the computation continues. Divided
    weights are not gathered after the update, but before each use.
    """
    if not tensors.buckets:
        return 0.0, 0.0

    def size(bucket_elements: int, dtype: str) -> float:
        return float(bucket_elements * item_bytes(dtype))

    largest = max(
        size(bucket.width * bucket.placement.shard.size, bucket.gradient_dtype(job.cfg.amp_master_grad))
        for bucket in tensors.buckets
    )
    gathered = max(
        (
            size(bucket.columns * bucket.placement.shard.size, bucket.entries[0].dtype)
            for bucket in tensors.buckets
            if not bucket.unit
        ),
        default=0.0,
    )
    after = max(2 * largest, 3 * gathered)
    if job.on_cpu and job.zero_stage < 2:
        return max(_sent_at_end(tensors.buckets), _published(tensors.buckets, job.zero_stage)), 0.0
    if job.on_cpu and job.zero_stage == 2 and job.element_bytes == FP32 and job.degrees.pipeline == 1:
        sent = _sent_after_pass(tensors.buckets, job.num_microbatches == 1)
        return max(sent, _published(tensors.buckets, job.zero_stage)), 0.0
    if job.on_cpu or job.zero_stage == 3:
        return after, 2 * largest if job.zero_stage >= 2 else 0.0
    return after, (IN_FLIGHT + 1 if job.zero_stage == 2 else 1) * largest


# The next three follow parallel/grad_sync.py and zero.py on a CPU, where gradients are fp32. All give the most bytes
# beyond the gradients that are counted anyway: whole ones, or in ZeRO stage 2 the chunks that a rank keeps.


def _sent_at_end(buckets: Sequence[Bucket]) -> float:
    """All buckets are sent before the first one is taken: a bucket takes the place of its gradients, beside which it is
    put together; chunks arrive beside both.
    """
    most = arrived = 0.0
    for bucket in buckets:
        ranks = bucket.placement.shard.size
        most = max(most, arrived + FP32 * bucket.width * ranks)
        arrived += FP32 * bucket.width if ranks > 1 else 0
    return max(most, arrived)


def _sent_after_pass(buckets: Sequence[Bucket], is_first: bool) -> float:
    """Stage 2: the whole gradients of a backward pass exist until its buckets are sent, one after another. `is_first`:
    nothing is kept from an earlier pass, and what arrives takes its place.
    """
    divided = [bucket for bucket in buckets if bucket.placement.shard.size > 1]
    most, beyond = 0.0, float(sum(FP32 * bucket.width * bucket.placement.shard.size for bucket in divided))
    beyond -= sum(FP32 * bucket.width for bucket in divided) if is_first else 0
    for bucket in buckets:
        size = FP32 * bucket.width * bucket.placement.shard.size
        most = max(most, beyond + size)
        if bucket in divided:
            beyond += (FP32 * bucket.width if is_first else 0) - size
    return most


def _published(buckets: Sequence[Bucket], zero_stage: int) -> float:
    """The updated chunks of all parameters, and one bucket that is gathered and then taken apart. Of the gradients
    only the chunks are left by then.
    """
    divided = [bucket for bucket in buckets if bucket.placement.shard.size > 1 and not bucket.unit]
    if not divided:
        return 0.0
    updated = sum(bucket.columns * item_bytes(bucket.entries[0].dtype) for bucket in divided)
    whole = [bucket.columns * bucket.placement.shard.size * item_bytes(bucket.entries[0].dtype) for bucket in divided]
    gone = sum(FP32 * bucket.width * (bucket.placement.shard.size - 1) for bucket in divided) if zero_stage < 2 else 0
    return max(0.0, float(updated + 2 * max(whole) - gone))


def _communicators(mesh: Mesh) -> int:
    """Distinct groups of several ranks that a rank is in, and its neighbours along the pipeline, both ways."""
    groups = {ranks for ranks in rank_lists(mesh.degrees, mesh.rank).values() if len(ranks) > 1}
    return len(groups) + (4 if mesh.degrees.pipeline > 1 else 0)
