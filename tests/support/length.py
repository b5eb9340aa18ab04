"""What a training step on one long document takes: processor time, split into attention and the rest, and memory beside
the plan's.

`measure(keys)` runs on every rank of a world (tests/support/worlds.py), or in this process.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.memory_truth import allocated, make_batch, planned_bytes


def measure(keys: dict[str, Any]) -> dict[str, float]:
    """The second of two steps of the real trainer on rows of one document each.

    Returns:
        "attention" and "rest": processor seconds of this rank; "wall": seconds; "peak": the most bytes of tensors that
        the step had; "planned": the same by formula; "resident": the most memory of the process; "loss", "norm".
    """
    from paddle.base import core

    from erniekit import config
    from erniekit.parallel import backend
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import build_run
    from erniekit.training.outline import drop_outlines
    from erniekit.training.trainer import Trainer

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    drop_outlines()
    before = allocated()
    run = build_run(cfg, mesh)
    trainer = Trainer(run, [])
    batches = [make_batch(cfg, run.model.config, seed) for seed in range(cfg.gradient_accumulation_steps)]
    clock = _Clock()
    try:
        trainer.train_step(batches)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is counted from here on
        clock.seconds = 0.0
        wall, started = time.perf_counter(), time.process_time()
        metrics = trainer.train_step(batches)
        spent, wall = time.process_time() - started, time.perf_counter() - wall
        peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    finally:
        clock.close()
        run.close()
    planned = planned_bytes(cfg, run.model.config, mesh)
    return {
        "attention": clock.seconds,
        "rest": spent - clock.seconds,
        "wall": wall,
        "peak": peak,
        "planned": sum(planned.values()),
        "resident": _highest_resident(),
        "loss": metrics.loss,
        "norm": metrics.grad_norm,
    }


class _Clock:
    """Adds up the processor time of attention between the projections, forward and backward, while it is open."""

    def __init__(self) -> None:
        from erniekit.nn.attention import _DocumentAttention
        from erniekit.parallel.ring_attention import _RingAttention

        self.seconds = 0.0
        self._kept = [
            (node, name, getattr(node, name)) for node in (_DocumentAttention, _RingAttention) for name in PASSES
        ]
        for node, name, function in self._kept:
            setattr(node, name, staticmethod(self._timed(function)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.process_time()
            result = function(*args)
            self.seconds += time.process_time() - started
            return result

        return timed

    def close(self) -> None:
        """Measure no longer."""
        for node, name, function in self._kept:
            setattr(node, name, staticmethod(function))


PASSES = ("forward", "backward")


def _highest_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
