"""How a model's work is divided over ranks: what the planner's communication and time need to know of a run.

`layout_of` makes it from a job. It also describes runs of other toolkits, which have context parallelism and overlaps
that this one has not; the planner's accuracy is measured on published runs of theirs.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from erniekit.parallel.pipeline_schedule import Action, plan
from erniekit.plan.flops import NOTHING, Recomputed, recomputed_by
from erniekit.plan.job import Job
from erniekit.plan.work import Layer, Product, Work


@dataclass(frozen=True)
class Layout:
    """Degrees, batch and precision of a run.

    `data`: all data ranks (the context ranks of a sequence, `context`, are counted beside them). `sharding`: ranks that
    share one copy of the optimizer's state; `zero_stage` 3 divides the weights as well, with `blocks_alone` only those
    of the decoder layers, gathered while nothing else runs, as in this toolkit. `microbatch_tokens`: tokens of
    a microbatch on one data rank, in documents of the lengths `lengths`. `precision`: of the products in the parts
    `fp8_parts`. `deduplicated`: a token is sent once to each rank that has experts of it, not once for each
    expert; `fp8_dispatch`: in 8 bits, and so the gradients of what the experts return.
    `overlap_tensor`, `overlap_expert`: these collectives run while products are computed. `synchronous_sends`: a
    pipeline send waits for its receiver, as in this toolkit on GPUs.
    """

    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    expert: int = 1
    context: int = 1
    data: int = 1
    sharding: int = 1
    zero_stage: int = 0
    blocks_alone: bool = False
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    microbatches: int = 1
    microbatch_tokens: int = 4096
    lengths: tuple[int, ...] = (4096,)
    supervised: float = 1.0
    gpus_per_node: int = 8
    precision: str = "bf16"  # bf16 (any 16 bits), fp32, fp8, fp8_blockwise
    fp8_parts: frozenset[str] = frozenset({"attention", "mlp", "experts"})
    element_bytes: int = 2
    gradient_bytes: int = 4
    recomputed: Recomputed = field(default=NOTHING)
    flash_attention: bool = True
    fp8_dispatch: bool = False
    deduplicated: bool = False
    overlap_tensor: bool = False
    overlap_expert: bool = False
    synchronous_sends: bool = False
    passes_ahead: float = 0
    offload_optimizer: bool = False
    offload_activations: bool = False

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def rank_tokens(self) -> float:
        """Tokens of one microbatch on one context rank, all tensor ranks together."""
        return self.microbatch_tokens / self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all data ranks."""
        return self.microbatch_tokens * self.microbatches * self.data

    def shards(self, product: Product) -> int:
        """Over how many ranks a product's weight is divided, its layer being on one stage."""
        if product.experts > 1:
            return self.expert * self.tensor
        return self.tensor if product.tensor_split else 1

    def spans_hosts(self, size: int, stride: int = 1) -> bool:
        """Whether a group of `size` ranks at distances of `stride` is on several hosts; rank = (p D + d) T + t."""
        return size > 1 and size * stride > self.gpus_per_node

    def actions(self, microbatches: int | None = None) -> list[list[Action]]:
        """The actions of each stage in one step, or in a step of another number of microbatches."""
        count = self.microbatches if microbatches is None else microbatches
        return _actions(self.schedule, self.pipeline, count, self.chunks, self.synchronous_sends)


# Layouts that differ in recomputation alone have the same lists.
_actions = lru_cache(maxsize=32)(plan)


@dataclass(frozen=True)
class Run:
    """A model and how it is divided: `stages[stage][chunk]` are the layers of each pipeline chunk, `numbers` the same
    as numbers of decoder layers.
    """

    work: Work
    layout: Layout
    numbers: list[list[tuple[int, ...]]]

    def chunk(self, stage: int, chunk: int) -> tuple[Layer, ...]:
        """The layers, and the ends of the model, in a chunk of a stage."""
        return self.work.chunk(self.numbers[stage][chunk])

    def stage(self, stage: int) -> tuple[Layer, ...]:
        """All layers of a stage."""
        return tuple(layer for chunk in range(self.layout.chunks) for layer in self.chunk(stage, chunk))

    def is_recomputed(self, layer_number: int) -> bool:
        """Whether a decoder layer may compute parts again."""
        return layer_number not in self.layout.recomputed.not_in


def run_of(job: Job, work: Work) -> Run:
    """A job's layout; `work`: what its model computes (work_of)."""
    return Run(work, layout_of(job), job.stages)


def _precision(job: Job) -> str:
    if job.element_bytes == 4:
        return "fp32"
    return {"none": "bf16", "blockwise": "fp8_blockwise"}.get(job.cfg.fp8, "fp8")


def layout_of(job: Job) -> Layout:
    """How a job's model, batch and state are divided."""
    cfg, degrees = job.cfg, job.degrees
    recomputed = NOTHING
    if cfg.recompute:
        recomputed = recomputed_by(cfg.recomputed_modules, cfg.use_recompute_mtp, cfg.no_recompute_layers)
    return Layout(
        tensor=degrees.tensor,
        pipeline=degrees.pipeline,
        chunks=job.num_chunks,
        expert=degrees.expert,
        context=degrees.context,
        data=degrees.batch,
        sharding=max(degrees.sharding // degrees.context, 1) if job.zero_stage else 1,
        zero_stage=job.zero_stage,
        blocks_alone=True,
        sequence_parallel=job.sequence_parallel,
        schedule=job.schedule,
        microbatches=job.num_microbatches,
        microbatch_tokens=job.microbatch_tokens,
        lengths=tuple(job.document_lengths),
        supervised=job.supervised_share,
        gpus_per_node=job.cluster.gpus_per_node,
        precision=_precision(job),
        fp8_parts=frozenset(cfg.fp8_modules),
        element_bytes=job.element_bytes,
        recomputed=recomputed,
        synchronous_sends=not job.on_cpu,
        passes_ahead=job.passes_ahead,
        offload_optimizer=job.offloads_state,
        offload_activations=job.offloads_activations,
    )
