"""loss.png: training loss, evaluation loss, rewards and learning rate over the steps, drawn from metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from erniekit.training.reporting.metrics_file import FILE_NAME, read_metrics
from erniekit.training.reporting.picture import Picture
from erniekit.utils import atomic, plot_text

_TRAIN, _EVAL, _RATE, _QUIET = "#2563c9", "#d9480f", "#4b5563", "#9ca3af"
_MODALITIES = {"text": "#0f766e", "image": "#9333ea", "video": "#b45309"}


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a thirtieth of the run (1-D, same length); windows end where the run does."""
    half = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    steps = np.arange(len(values))
    first, last = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def column(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a number under `name`."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@plot_text.in_any_script()
def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the records of a metrics file into a PNG: loss, for preference training rewards, and learning rate."""
    # Imported late, since matplotlib takes half a second to import. Without pyplot, a figure needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, rewards = column(records, "reward_margin")
    has_rewards = len(steps) > 0
    height = 8 if has_rewards else 6
    figure = Figure(figsize=(9, height), dpi=120)
    FigureCanvasAgg(figure)
    heights = [3, 2, 1] if has_rewards else [3, 1]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    # Fixed margins: a layout engine draws everything several times to measure it.
    figure.subplots_adjust(
        left=0.09, right=0.92 if has_rewards else 0.985, top=1 - 0.33 / height, bottom=0.55 / height, hspace=0.12
    )
    upper, lower = panels[0], panels[-1]
    _draw_train(upper, *column(records, "loss"), _TRAIN, "train")
    _draw_modalities(upper, records)
    _draw_eval(upper, *column(records, "eval_loss"))
    upper.set_ylabel(_meaning_of_loss(records, has_rewards))
    upper.set_title(title, loc="left", fontsize=11, parse_math=False)
    upper.legend(frameon=False)
    if has_rewards:
        _draw_train(panels[1], steps, rewards, _TRAIN, "margin, train")
        _draw_eval(panels[1], *column(records, "eval_reward_margin"))
        panels[1].set_ylabel("reward margin")
        accuracy = panels[1].twinx()
        _draw_train(accuracy, *column(records, "reward_accuracy"), _RATE, "accuracy, train")
        accuracy.set_ylabel("reward accuracy", color=_RATE)
        accuracy.set_ylim(-0.03, 1.03)
        accuracy.spines["top"].set_visible(False)
        lines = [*panels[1].get_lines(), *accuracy.get_lines()]
        shown = [line for line in lines if not line.get_label().startswith("_")]
        panels[1].legend(shown, [line.get_label() for line in shown], frameon=False)
    rate_steps, rate = column(records, "learning_rate")
    lower.plot(rate_steps, rate, color=_RATE, linewidth=1.5, marker="o" if len(rate) == 1 else None)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    lower.set_ylim(bottom=0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in panels:
        axes.grid(True, color=_QUIET, alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _meaning_of_loss(records: list[dict[str, Any]], is_preference: bool) -> str:
    if is_preference:
        return "preference loss (mean over pairs)"
    if any("reward_good" in record or "reward_bad" in record for record in records):
        return "KTO loss (mean over answers)"
    return "policy loss" if any("frac_reward_zero_std" in record for record in records) else "loss (nats per token)"


def _draw_train(axes: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draws every step; in long runs faintly, under the moving average."""
    is_long = len(steps) >= 60
    marker = "o" if len(steps) == 1 else None
    name = f"{label}, each step"
    axes.plot(steps, values, color=color, alpha=0.3 if is_long else 1, linewidth=1, marker=marker, label=name)
    if is_long:
        axes.plot(steps, smooth(values), color=color, linewidth=2, label=f"{label}, smoothed")


def _draw_modalities(axes: Any, records: list[dict[str, Any]]) -> None:
    """The losses of text, images and videos, where the data have more than one of them; each is drawn where it was. A
    point is an evaluation.
    """
    columns = {name: column(records, f"loss_{name}") for name in _MODALITIES}
    if sum(len(steps) > 0 for steps, _ in columns.values()) > 1:
        for name, (steps, values) in columns.items():
            if len(steps):
                axes.plot(steps, smooth(values), color=_MODALITIES[name], linewidth=1, linestyle="--", label=name)
    evaluated = {name: column(records, f"eval_loss_{name}") for name in _MODALITIES}
    if sum(len(steps) > 0 for steps, _ in evaluated.values()) > 1:
        for name, (steps, values) in evaluated.items():
            if len(steps):
                label = f"evaluation, {name}"
                axes.plot(
                    steps, values, color=_MODALITIES[name], marker="o", markersize=4, linestyle="none", label=label
                )


def _draw_eval(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    if len(steps):
        axes.plot(steps, values, color=_EVAL, linewidth=1.2, marker="o", markersize=5, label="evaluation")


class LossPlot(Picture):
    """output_dir/loss.png."""

    name = "loss.png"
    numbers = FILE_NAME

    def draw_run(self, directory: Path) -> None:
        """Draw metrics.jsonl, once it has a loss."""
        records = list(read_metrics(directory / FILE_NAME))
        if any(record.get("loss") is not None for record in records):
            with atomic.new_file(directory / self.name) as temporary:
                draw(records, temporary, directory.name)
