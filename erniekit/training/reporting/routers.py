"""Writes routers.jsonl and expert_load.png: the statistics of each sparse layer's router, step by step."""

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.training.reporting.metrics_file import read_records
from erniekit.utils import atomic, log

FILE_NAME = "routers.jsonl"
_SHOWN_STEPS = 50  # the loads in the picture are means over the last N steps


class RouterLog(Callback):
    """Writes output_dir/routers.jsonl: {"step", "layers": {"1": {load_max_over_mean, entropy, ..., "load": [E]}}} a
    step, for models with experts. Draws output_dir/expert_load.png at each save and at the end.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path = Path()
        self._start_step = 0

    def on_start(self, run: RunInfo) -> None:
        """Remember the run's directory; files are created at the first step with routers."""
        self._path = run.output_dir / FILE_NAME
        self._start_step = run.start_step

    def on_step(self, metrics: StepMetrics) -> None:
        """Append the step."""
        if not metrics.routers:
            return
        if self._file is None:
            earlier = read_records(self._path) if self._start_step and self._path.exists() else ()
            kept = [json.dumps(record) + "\n" for record in earlier if record["step"] <= self._start_step]
            atomic.write_text(self._path, "".join(kept))
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 open for the run
        self._write({"step": metrics.step, "layers": metrics.routers})

    def on_save(self, step: int, path: Path) -> None:
        """Draw the run so far."""
        self._draw()

    def on_end(self, summary: dict[str, Any]) -> None:
        """Draw and close."""
        self._draw()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _draw(self) -> None:
        if self._file is None:
            return
        try:
            with atomic.new_file(self._path.with_name("expert_load.png")) as temporary:
                draw(list(read_records(self._path)), temporary)
        except Exception as error:  # an error of the picture must not end the run
            log.warning(f"expert_load.png could not be drawn: {error}")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Loads of the last steps (layers by experts, 1 = even) over the busiest expert's load in time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = list(records[-1]["layers"])
    last = records[-_SHOWN_STEPS:]
    loads = np.array([np.mean([record["layers"][layer]["load"] for record in last], axis=0) for layer in layers])
    shares = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)  # a step of text alone: nothing of vision
    steps = [record["step"] for record in records]
    worst = np.array([[record["layers"][layer]["load_max_over_mean"] for layer in layers] for record in records])
    figure = Figure(figsize=(9, 3 + 0.25 * len(layers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[1 + 0.15 * len(layers), 1])
    image = upper.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    upper.set_yticks(range(len(layers)), layers)
    upper.set_ylabel("layer")
    upper.set_xlabel("expert")
    upper.set_title(f"expert load over the last {len(last)} steps (1 = even)", loc="left", fontsize=11)
    figure.colorbar(image, ax=upper)
    lower.plot(steps, worst.mean(axis=1), color="#2563c9", linewidth=1.5, label="mean over layers")
    lower.fill_between(steps, worst.min(axis=1), worst.max(axis=1), color="#2563c9", alpha=0.15, label="range")
    lower.axhline(1.0, color="#9ca3af", linewidth=0.8)
    lower.set_ylabel("max / mean load")
    lower.set_xlabel("optimizer step")
    lower.legend(frameon=False)
    for side in ("top", "right"):
        lower.spines[side].set_visible(False)
    figure.savefig(path, format="png")
