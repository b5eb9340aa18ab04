"""Before a run builds its model: whether it will fit the device, by the plan (erniekit/plan)."""

import paddle

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.plan.job import CPU, Cluster, make_job
from erniekit.plan.memory import plan_memory
from erniekit.training.outline import drop_outlines, outline_stage
from erniekit.utils import log
from erniekit.utils.host_memory import host_memory
from erniekit.utils.runtime import local_ranks


def warn_if_too_large(cfg: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Log a warning, on the first rank, where the plan needs more memory than the rank with the least has, with the
    cheapest single change by which it would fit. The run goes ahead: a plan assumes full rows. All ranks call it.
    """
    capacities = comm.gather_objects(_capacity(mesh.world), mesh.world_group)
    if mesh.rank:
        return
    try:
        _warn(cfg, model, mesh, capacities)
    finally:
        drop_outlines()


def _capacity(ranks: int) -> float:
    """Bytes of memory that this rank has for itself."""
    device = paddle.get_device()
    if device == "cpu":
        return host_memory() / local_ranks(ranks)
    return float(paddle.device.cuda.get_device_properties(device).total_memory)


def _warn(cfg: Config, model: ModelConfig, mesh: Mesh, capacities: list[float]) -> None:
    device, ranks, capacity = paddle.get_device(), mesh.world, min(capacities)
    gpu = CPU if device == "cpu" else paddle.device.cuda.get_device_properties(device).name
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
    where = device if capacity == max(capacities) else f"{device} of rank {capacities.index(capacity)}"
    log.warning(
        f"this run may not fit: with full rows a rank of stage {worst.stage} needs {gigabytes(worst.peak)}, and "
        f"{where} has {gigabytes(worst.usable)} for it; {hint}"
    )
