"""`erniekit train`: build, fit, report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from erniekit.config.schema import Config
from erniekit.join import join
from erniekit.parallel.mesh import Mesh
from erniekit.precision import policy
from erniekit.training.build import build_run
from erniekit.training.callbacks import Callback, StepMetrics, build_callbacks
from erniekit.training.output_dir import OutputDir
from erniekit.training.trainer import Trainer
from erniekit.utils import log, runtime
from erniekit.utils.wording import count_of


@dataclass(frozen=True)
class TrainResult:
    """`history`: one dict a step that this call trained, as in metrics.jsonl. `summary`: as in summary.json."""

    output_dir: Path
    history: list[dict[str, Any]]
    summary: dict[str, Any]


class _History(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics.record())


def _device_line(model: nn.Layer, has_masters: bool, mesh: Mesh) -> str:
    """A line about the device: "device: AMD EPYC 9454, 2 threads; weights float32; 1 process"."""
    ranks = count_of(mesh.degrees.world, "process", "processes")
    return f"device: {runtime.device_name()}; {policy.describe(model, has_masters)}; {ranks}"


def train(cfg: Config) -> TrainResult:
    """Train as `cfg` says. Raises UserError for anything that the user can fix; saved files are never lost."""
    mesh = join(cfg)
    history = _History()
    # The numbers are the same on every rank; one of them reports.
    callbacks: list[Callback] = [*build_callbacks(cfg), history] if mesh.rank == 0 else [history]
    products = policy.products(cfg.matmul_precision, paddle.get_device())
    with products, OutputDir(cfg, mesh.world_group) as output:  # its checks come before weights are read
        run = build_run(cfg, mesh)
        if mesh.rank == 0:
            log.info(_device_line(run.model, run.optimizer.has_masters, mesh))
        summary = Trainer(run, callbacks, output).fit()
    return TrainResult(output.path, history.steps, summary)
