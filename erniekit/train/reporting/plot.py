"""loss.png: training loss, evaluation loss and learning rate over the steps, drawn from metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from erniekit.train.reporting.base import Callback, RunInfo
from erniekit.train.reporting.metrics_file import FILE_NAME, read_metrics
from erniekit.utils import atomic, log

_TRAIN, _EVAL, _RATE, _QUIET = "#2563c9", "#d9480f", "#4b5563", "#9ca3af"


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the run (1-D, same length); windows end where the run does."""
    half = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    steps = np.arange(len(values))
    first, last = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _column(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a number under `name`."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the records of a metrics file into a PNG."""
    # Not at the top: matplotlib takes half a second to import. No pyplot: a figure of our own needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, loss = _column(records, "loss")
    eval_steps, eval_loss = _column(records, "eval_loss")
    rate_steps, rate = _column(records, "learning_rate")
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    few = "o" if len(steps) == 1 else None
    upper.plot(
        steps,
        loss,
        color=_TRAIN,
        alpha=0.3 if len(steps) >= 60 else 1,
        linewidth=1,
        marker=few,
        label="train, each step",
    )
    if len(steps) >= 60:
        upper.plot(steps, smooth(loss), color=_TRAIN, linewidth=2, label="train, smoothed")
    if len(eval_steps):
        upper.plot(eval_steps, eval_loss, color=_EVAL, linewidth=1.2, marker="o", markersize=5, label="evaluation")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title, loc="left", fontsize=11)
    upper.legend(frameon=False)
    lower.plot(rate_steps, rate, color=_RATE, linewidth=1.5, marker=few)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    lower.set_ylim(bottom=0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (upper, lower):
        axes.grid(True, color=_QUIET, alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    figure.savefig(path, format="png")


class LossPlot(Callback):
    """Draws output_dir/loss.png at each save and at the end. A plot that fails is a warning: the numbers are safe."""

    def __init__(self) -> None:
        self._directory: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        """Remember where the run is."""
        self._directory = run.output_dir

    def on_save(self, step: int, path: Path) -> None:
        """Draw what there is so far."""
        self._draw()

    def on_end(self, summary: dict[str, Any]) -> None:
        """Draw the whole run."""
        self._draw()

    def _draw(self) -> None:
        if self._directory is None:  # the run ended before it began
            return
        path = self._directory / "loss.png"
        try:
            records = list(read_metrics(self._directory / FILE_NAME))
            if not any(record.get("loss") is not None for record in records):
                return
            with atomic.new_file(path) as temporary:
                draw(records, temporary, self._directory.name)
        except Exception as error:  # whatever a drawing library may raise: no plot is worth a run
            log.warning(f"{path}: not drawn ({type(error).__name__}: {error}); the numbers are in {FILE_NAME}")
