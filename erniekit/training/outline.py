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


def outline_stage(job: Job, stage: int) -> tuple[CausalLM, Mesh]:
    """The model of the first rank of a stage, what is not trained frozen, and that rank."""
    mesh = Mesh.outline(job.degrees, stage * job.degrees.data * job.degrees.tensor)
    options = build.training_options(job.cfg, "cpu" if job.on_cpu else "gpu:0")
    stored = None
    if isinstance(options.adapter, build.AdapterDirectory):
        stored = read_adapter(Path(options.adapter.path), job.model)
    model = build.outline(job.model, options, mesh, job.stages[stage], stored)
    freeze_untrained_mtp(model, job.cfg)
    freeze(model, job.cfg)
    return model, mesh


@lru_cache(maxsize=256)
def stage_tensors(job: Job, stage: int) -> RankTensors:
    """What each rank of a stage keeps; see plan/tensors.py."""
    model, mesh = outline_stage(job, stage)
    return rank_tensors(job, mesh, model, job.stages[stage])
