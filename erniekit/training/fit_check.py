"""Before a run builds its model: whether it will fit the device, by the plan (erniekit/plan)."""

import paddle

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.parallel.mesh import Mesh
from erniekit.plan.job import CPU, Cluster, make_job
from erniekit.plan.memory import plan_memory
from erniekit.training.outline import drop_outlines, outline_stage
from erniekit.utils import log
from erniekit.utils.host_memory import host_memory
from erniekit.utils.runtime import local_ranks


def warn_if_too_large(cfg: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Log a warning, on the first rank, where the plan needs more memory than the device has, with the cheapest single
    change by which it would fit. The run goes ahead: a plan assumes full rows.
    """
    if mesh.rank:
        return
    try:
        _warn(cfg, model, mesh)
    finally:
        drop_outlines()


def _warn(cfg: Config, model: ModelConfig, mesh: Mesh) -> None:
    device, ranks = paddle.get_device(), mesh.world
    if device == "cpu":
        gpu, capacity = CPU, host_memory() / local_ranks(ranks)
    else:
        properties = paddle.device.cuda.get_device_properties(device)
        gpu, capacity = properties.name, float(properties.total_memory)
    job = make_job(cfg, model, Cluster(ranks, gpu, ranks))
    plan = plan_memory(job, capacity, outline_stage)
    if plan.fits:
        return
    # imported late: most runs fit
    from erniekit.plan import advice
    from erniekit.plan.report import gigabytes

    cure = advice.cheapest_fit(advice.changes(plan, capacity, outline_stage))
    hint = "`erniekit plan` shows what takes it" if cure is None else f"it would fit with {cure.text}"
    worst = plan.worst
    log.warning(
        f"this run may not fit: with full rows a rank of stage {worst.stage} needs {gigabytes(worst.peak)}, and "
        f"{device} has {gigabytes(worst.usable)} for it; {hint}"
    )
