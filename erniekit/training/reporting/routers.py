"""Writes routers.jsonl and expert_load.png: the statistics of each sparse layer's router, step by step."""

import json
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from erniekit.training.reporting.base import RunInfo, StepMetrics
from erniekit.training.reporting.metrics_file import drop_later_records
from erniekit.training.reporting.picture import Picture
from erniekit.utils import atomic
from erniekit.utils.wording import count_of

FILE_NAME = "routers.jsonl"
_SHOWN_STEPS = 50  # the loads in the picture are means over the last N steps


class RouterLog(Picture):
    """Writes output_dir/routers.jsonl: {"step", "layers": {"1": {load_max_over_mean, entropy, ..., "load": [E]}}} a
    step, for models with experts, and draws output_dir/expert_load.png.

    The file has tens of kilobytes a step for a large model, so it is read once, line by line, where a run resumes, and
    what the picture shows is kept.
    """

    name = "expert_load.png"
    numbers = FILE_NAME

    def __init__(self) -> None:
        super().__init__()
        self._file: TextIO | None = None
        self._path = Path()
        self._start_step = 0
        self._last: deque[dict[str, Any]] = deque(maxlen=_SHOWN_STEPS)
        self._worst: list[tuple[int, float, float, float]] = []  # step; mean, least and most of load_max_over_mean

    def on_start(self, run: RunInfo) -> None:
        """Remember the run's directory; files are created at the first step with routers."""
        super().on_start(run)
        self._path = run.output_dir / FILE_NAME
        self._start_step = run.start_step

    def on_step(self, metrics: StepMetrics) -> None:
        """Append the step."""
        if not metrics.routers:
            return
        if self._file is None:
            drop_later_records(self._path, self._start_step, self._keep)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 open for the run
        record = {"step": metrics.step, "layers": metrics.routers}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._keep(record)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Draw and close."""
        super().on_end(summary)
        if self._file is not None:
            self._file.close()
            self._file = None

    def draw_run(self, directory: Path) -> None:
        """Draw the steps that had routers."""
        if self._last:
            with atomic.new_file(directory / self.name) as temporary:
                draw(list(self._last), np.array(self._worst), temporary)

    def _keep(self, record: dict[str, Any]) -> None:
        layers: Any = record.get("layers")
        if _has_loads(layers):
            self._last.append(layers)
            worst = [layer["load_max_over_mean"] for layer in layers.values()]
            self._worst.append((record["step"], sum(worst) / len(worst), min(worst), max(worst)))


def _has_loads(layers: Any) -> bool:
    """Whether a record, which a file may have from elsewhere, is one that on_step writes."""
    known = isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())
    return known and bool(layers) and all({"load", "load_max_over_mean"} <= layer.keys() for layer in layers.values())


def draw(last: list[dict[str, Any]], worst: np.ndarray, path: Path) -> None:
    """Loads of the last steps (layers by experts, 1 = even) over the busiest expert's load in time.

    `last`: what the routers of each layer did, of the last steps. `worst` [steps, 4], float64: the step, and the mean,
    the least and the most over layers of the busiest expert's load over the mean load.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = list(last[-1])
    loads = np.array([np.mean([step[layer]["load"] for step in last], axis=0) for layer in layers])
    shares = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-9)  # a step of text alone: nothing of vision
    steps, mean, least, most = worst.T
    figure = Figure(figsize=(9, 3 + 0.25 * len(layers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[1 + 0.15 * len(layers), 1])
    image = upper.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    upper.set_yticks(range(len(layers)), layers)
    upper.set_ylabel("layer")
    upper.set_xlabel("expert")
    upper.set_title(f"expert load over the last {count_of(len(last), 'step')} (1 = even)", loc="left", fontsize=11)
    figure.colorbar(image, ax=upper)
    lower.plot(steps, mean, color="#2563c9", linewidth=1.5, label="mean over layers")
    lower.fill_between(steps, least, most, color="#2563c9", alpha=0.15, label="range")
    lower.axhline(1.0, color="#9ca3af", linewidth=0.8)
    lower.set_ylabel("max / mean load")
    lower.set_xlabel("optimizer step")
    lower.legend(frameon=False)
    for side in ("top", "right"):
        lower.spines[side].set_visible(False)
    figure.savefig(path, format="png")
