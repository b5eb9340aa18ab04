"""The model of one pipeline stage of a planned job, as `build_run` would make it, but without memory."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

from erniekit import build
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.config.schema import Config, fields
from erniekit.models.decoder import CausalLM
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.plan.job import Job
from erniekit.training.freezing import freeze, freeze_untrained_mtp
from erniekit.utils import log

# Keys that the parameters of a stage do not depend on: plans that differ in them share the outlines.
_NOT_OF_PARAMETERS = (
    "batch_size",
    "gradient_accumulation_steps",
    "recompute",
    "recompute_granularity",
    "recompute_modules",
    "offload_activations",
    "use_recompute_moe",
    "use_recompute_mtp",
    "no_recompute_layers",
    "sharding",
    "pipeline_schedule",
    "ref_logps_cache",
    "loss_subbatch_seqlen",
    "moment_dtype",
    "offload_optim",
)


def outline_stage(job: Job, stage: int) -> tuple[CausalLM, Mesh]:
    """The model of the first rank of a stage, what is not trained frozen, and that rank. Of stages whose layers are of
    the same kinds, in the same order, it is that of the first one.
    """
    usual: dict[str, Any] = {name: fields()[name].default for name in _NOT_OF_PARAMETERS}
    same = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, **usual))
    like = stage if _names_layers(job.cfg) else [_kinds(job, i) for i in range(stage + 1)].index(_kinds(job, stage))
    return _outline(same, like, tuple(job.stages[like]))


def _names_layers(cfg: Config) -> bool:
    """Whether keys may treat layers of one kind differently, by their numbers."""
    of_fp8 = cfg.fp8 != "none" and cfg.fp8_recompute_up_gate_layers
    return bool(cfg.frozen_parameters or cfg.lora_target_modules or cfg.modules_to_save or cfg.lora_path or of_fp8)


def _kinds(job: Job, stage: int) -> tuple[object, ...]:
    """What the parameters of a stage follow from."""
    ends = stage == 0, stage == job.degrees.pipeline - 1
    return *ends, *(tuple(job.model.is_moe_layer(layer) for layer in chunk) for chunk in job.stages[stage])


def outline_layers(job: Job) -> CausalLM | None:
    """One decoder layer of each kind that the model has, as a rank of these tensor and expert degrees has it, without
    the ends of the model; None where keys may treat layers of one kind differently.
    """
    if _names_layers(job.cfg):
        return None
    sparse = [job.model.is_moe_layer(layer) for layer in range(job.model.num_hidden_layers)]
    layers = tuple(sorted({kind: sparse.index(kind) for kind in sparse}.values()))
    middle = ParallelDims(pipeline=3, data=job.degrees.expert, tensor=job.degrees.tensor, expert=job.degrees.expert)
    return _outline(dataclasses.replace(job, degrees=middle), 1, (layers,))[0]


@lru_cache(maxsize=128)
def _outline(job: Job, stage: int, chunks: tuple[tuple[int, ...], ...]) -> tuple[CausalLM, Mesh]:
    mesh = Mesh.outline(job.degrees, stage * job.degrees.data * job.degrees.tensor)
    with log.captured():
        options = build.training_options(job.cfg, "cpu" if job.on_cpu else "gpu:0")
    stored = None
    if isinstance(options.adapter, build.AdapterDirectory):
        stored = read_adapter(Path(options.adapter.path), job.model)
    model = build.outline(job.model, options, mesh, chunks, stored)
    with log.captured():  # each stage would say again what the run says once
        freeze_untrained_mtp(model, job.cfg)
        freeze(model, job.cfg)
    return model, mesh


def drop_outlines() -> None:
    """Forget the outlines made so far: their buffers are real tensors, which a run would keep beside its own."""
    _outline.cache_clear()
