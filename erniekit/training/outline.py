"""The model of one pipeline stage of a planned job, as `build_run` would make it, but without memory."""

from functools import lru_cache
from pathlib import Path

from erniekit import build
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.models.decoder import CausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.plan.job import Job
from erniekit.plan.tensors import RankTensors, rank_tensors
from erniekit.training.build import freeze_untrained_mtp
from erniekit.training.freezing import freeze
from erniekit.utils import log


@lru_cache(maxsize=64)
def outline_stage(job: Job, stage: int) -> tuple[CausalLM, Mesh]:
    """The model of the first rank of a stage, what is not trained frozen, and that rank."""
    mesh = Mesh.outline(job.degrees, stage * job.degrees.data * job.degrees.tensor)
    with log.captured():
        options = build.training_options(job.cfg, "cpu" if job.on_cpu else "gpu:0")
    stored = None
    if isinstance(options.adapter, build.AdapterDirectory):
        stored = read_adapter(Path(options.adapter.path), job.model)
    model = build.outline(job.model, options, mesh, job.stages[stage], stored)
    with log.captured():  # each stage would say again what the run says once
        freeze_untrained_mtp(model, job.cfg)
        freeze(model, job.cfg)
    return model, mesh


def stage_tensors(job: Job, stage: int) -> RankTensors:
    """What each rank of a stage keeps; see plan/tensors.py."""
    model, mesh = outline_stage(job, stage)
    return rank_tensors(job, mesh, model, job.stages[stage])
