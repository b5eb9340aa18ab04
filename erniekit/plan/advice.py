"""Which single change of a run saves most memory, which one makes it fit at the least cost, and on how many GPUs it
would fit at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from erniekit.models.weights import num_parameters
from erniekit.plan.hardware import Hardware
from erniekit.plan.job import Job
from erniekit.plan.memory import MemoryPlan, Outline, plan_memory
from erniekit.plan.timing import plan_time
from erniekit.plan.typed import read_keys, typed
from erniekit.precision.weight_only import SCHEMES
from erniekit.utils.errors import UserError

# Sizes of clusters that are tried for a model that does not fit, up to this many GPUs.
MAX_GPUS = 16384
_MAX_TRIED = 400


@dataclass(frozen=True)
class Change:
    """One change: the keys as a user would write them, the plan with them, and seconds of a step if they are known."""

    keys: dict[str, Any]
    plan: MemoryPlan
    seconds: float | None

    @property
    def text(self) -> str:
        """The keys, as on a command line."""
        return typed(self.keys)


def changes(plan: MemoryPlan, capacity: float, outline: Outline, card: Hardware | None = None) -> list[Change]:
    """The single changes that lower the peak of the stage with the least headroom, the cheapest first: by seconds of a
    step where they are planned, that is for changes that make the run fit on a known card, else in the order below.
    """
    found = []
    for keys in _candidates(plan.job, card):
        try:
            job = plan.job.changed(**keys)
        except UserError:  # the degrees do not fit the cluster or the model
            continue
        changed = plan_memory(job, capacity, outline)
        if changed.worst.peak < plan.worst.peak:
            seconds = plan_time(job, card).seconds if changed.fits and card is not None else None
            found.append(Change(keys, changed, seconds))
    return sorted(found, key=lambda change: change.seconds or 0.0)


def most_saving(found: list[Change]) -> Change | None:
    """The change with the lowest peak; None without one."""
    return min(found, key=lambda change: change.plan.worst.peak, default=None)


def cheapest_fit(found: list[Change]) -> Change | None:
    """The cheapest change with which the plan fits."""
    return next((change for change in found if change.plan.fits), None)


def _candidates(job: Job, card: Hardware | None) -> Iterator[dict[str, Any]]:
    """Keys that may save memory, with the global batch as it is, roughly by what they cost."""
    cfg, degrees = job.cfg, job.degrees
    smaller = next((rows for rows in range(cfg.batch_size // 2, 0, -1) if cfg.batch_size % rows == 0), 1)
    is_full = cfg.recompute and cfg.recompute_granularity == "full"
    candidates: list[tuple[bool, dict[str, Any]]] = [
        (degrees.data > 1 and not cfg.sharding, {"sharding": "stage1"}),
        (degrees.tensor > 1 and not cfg.sequence_parallel, {"sequence_parallel": True}),
        (job.has_second_model and not job.is_distilled, {"ref_logps_cache": "logps.safetensors"}),
        (job.num_chunks > 1 and cfg.pipeline_schedule == "1f1b", {"pipeline_schedule": "memory_efficient"}),
        (not cfg.recompute, {"recompute": True, "recompute_granularity": "core_attn"}),
        (not cfg.recompute and job.model.moe_num_experts > 0, {"recompute": True, "recompute_granularity": "moe"}),
        (degrees.data > 1 and job.zero_stage < 2, {"sharding": "stage2"}),
        (not is_full, {"recompute": True, "recompute_granularity": "full"}),
        (
            not job.on_cpu and not (is_full and cfg.offload_activations),
            {"recompute": True, "recompute_granularity": "full", "offload_activations": True},
        ),
        (degrees.data > 1 and job.zero_stage < 3, {"sharding": "stage3"}),
        *_of_weights(job, card),
        (cfg.batch_size > 1, {"batch_size": smaller, **_accumulated(job, cfg.batch_size // smaller)}),
        (job.model.moe_num_experts > 0, {"expert_parallel_degree": 2 * degrees.expert}),
        (True, {"pipeline_parallel_degree": 2 * degrees.pipeline, **_accumulated(job, 2)}),
        (True, {"tensor_parallel_degree": 2 * degrees.tensor, **_accumulated(job, 2)}),
    ]
    return (read_keys(cfg, keys) for makes_sense, keys in candidates if makes_sense)


def _accumulated(job: Job, times: int) -> dict[str, Any]:
    """The key by which a step has as many tokens as before, where a microbatch or the number of data ranks is divided
    by `times`.
    """
    return {"gradient_accumulation_steps": times * job.cfg.gradient_accumulation_steps}


def _of_weights(job: Job, card: Hardware | None) -> list[tuple[bool, dict[str, Any]]]:
    """Keys for what weights and optimizer take, each with whether it applies."""
    if job.is_lora:
        # The base in 8 bits is multiplied in bf16. A run in fp16 is mostly one on a GPU that has none.
        has_bf16 = job.cfg.compute_type != "fp16" if card is None else bool(card.bf16)
        return [(has_bf16 and not job.quantized_base and job.cfg.qat == "none", {"compute_type": "wint8"})]
    return [
        (job.cfg.moment_dtype == "fp32", {"moment_dtype": "bf16"}),
        (not job.on_cpu and not job.offloads_state, {"offload_optim": True}),
    ]


def least_cluster(job: Job, capacity: float, outline: Outline, gpus: int | None = None) -> MemoryPlan | None:
    """The plan for the fewest GPUs on which the run fits, or for exactly `gpus` of them: with other degrees, ZeRO stage
    1, sequence parallelism and full recomputation, and one row a microbatch. None: there is none.
    """
    candidates = (each for each in _layouts(job, capacity) if gpus in (None, each.cluster.gpus))
    hopeless: set[tuple[int, int]] = set()  # pipeline stages and tensor ranks, with any number of data ranks
    tried = 0
    for candidate in candidates:
        divided = candidate.degrees.pipeline, candidate.degrees.tensor
        if divided in hopeless:
            continue
        if tried == _MAX_TRIED:
            return None
        tried += 1
        plan = _first_stages(candidate, capacity, outline)
        if plan.fits and candidate.degrees.pipeline > 1:
            plan = plan_memory(candidate, capacity, outline)
        if plan.fits:
            return plan
        if plan.worst.activations.peak > plan.worst.usable:  # data ranks do not divide them
            hopeless.add(divided)
    return None


def _first_stages(job: Job, capacity: float, outline: Outline) -> MemoryPlan:
    """The plan of the first stages, by which most layouts that do not fit are found; without a pipeline that of all."""
    return plan_memory(job, capacity, outline, stages=None if job.degrees.pipeline == 1 else (0, 1))


def _layouts(job: Job, capacity: float) -> Iterator[Job]:
    """Layouts by rising number of GPUs, without those whose weights and state alone are too much."""
    per_node, parameters = job.cluster.gpus_per_node, num_parameters(job.model)
    for gpus, pipeline, tensor, expert in _sizes(job):
        makes_hosts = gpus <= per_node or gpus % per_node == 0
        if not makes_hosts or _least_bytes(job, parameters, gpus, pipeline, tensor, expert) > capacity:
            continue
        keys = _FRUGAL | {
            "pipeline_parallel_degree": pipeline,
            "tensor_parallel_degree": tensor,
            "expert_parallel_degree": expert,
            "sharding": "stage1" if gpus > pipeline * tensor else "",
            "sequence_parallel": tensor > 1,
            "gradient_accumulation_steps": max(job.num_microbatches, pipeline),
        }
        try:
            yield job.changed(replace(job.cluster, gpus=gpus), **keys)
        except UserError:
            continue


# What takes the least memory, whatever the layout.
_FRUGAL: dict[str, Any] = {
    "data_parallel_degree": -1,
    "sharding_parallel_degree": -1,
    "recompute": True,
    "recompute_granularity": "full",
    "no_recompute_layers": (),
    "virtual_pp_degree": 1,
    "pipeline_schedule": "1f1b",
    "pp_seg_method": "layer:DecoderLayer",
    "batch_size": 1,
}


def _sizes(job: Job) -> list[tuple[int, int, int, int]]:
    """(GPUs, pipeline stages, tensor ranks, expert ranks) that the model may be divided into, by rising number."""
    model = job.model
    powers = [2**n for n in range(15)]
    tensors = [n for n in powers if n <= job.cluster.gpus_per_node and model.num_key_value_heads % n == 0]
    experts = [n for n in powers if model.moe_num_experts and model.moe_num_experts % n == 0] or [1]
    pipelines = [n for n in (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 27, 32) if n <= model.num_hidden_layers]
    sizes = (
        (pipeline * tensor * expert * copies, pipeline, tensor, expert)
        for pipeline, tensor, expert, copies in product(pipelines, tensors, experts, (1, 2, 4, 8))
        if model.moe_num_experts % (tensor * expert) == 0
    )
    return sorted(size for size in sizes if size[0] <= MAX_GPUS)


def _least_bytes(job: Job, parameters: int, gpus: int, pipeline: int, tensor: int, expert: int) -> float:
    """A rank of this layout needs more than this for weights, gradients and state, by sizes alone."""
    model = job.model
    sparse = sum(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    one = 3 * model.hidden_size * sum(model.expert_sizes)
    in_experts = sparse * model.moe_num_experts * one
    others = parameters - in_experts
    kept, divided = _bytes_of_parameter(job)
    data = gpus / (pipeline * tensor)
    of_experts = in_experts / (pipeline * tensor * expert) * (kept + divided * expert / data)
    return of_experts + others / (pipeline * tensor) * (kept + divided / data)


def _bytes_of_parameter(job: Job) -> tuple[float, float]:
    """Bytes of weight and gradient, and of optimizer state, of each parameter."""
    if not job.is_lora:
        return job.element_bytes + 4, 12 if job.element_bytes == 2 else 8
    schemes = SCHEMES.get(job.cfg.compute_type)
    return job.element_bytes if schemes is None else schemes.experts.bits / 8, 0.0
