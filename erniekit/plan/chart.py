"""A plan as a picture: memory by stage and kind, and the time of a step by kind."""

from pathlib import Path
from typing import Any

from erniekit.plan.memory import MemoryPlan
from erniekit.plan.timing import StepTime
from erniekit.utils import atomic

_COLORS = {
    "parameters": "#4269d0",
    "gradients": "#efb118",
    "optimizer state": "#ff725c",
    "reference model": "#9c6b4e",
    "states of the teacher": "#c9a227",
    "average of weights": "#ff8ab7",
    "base of adapters": "#a463f2",
    "activations": "#3ca951",
    "exchange": "#6cc5b0",
    "communicators": "#9498a0",
}


def draw(memory: MemoryPlan, time: StepTime | None, path: Path) -> None:
    """Write the picture as a PNG file."""
    # Imported late: matplotlib takes half a second. Without pyplot, a figure needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2 if time is None else 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(memory), fontsize=11)
    rows = figure.subplots(1 if time is None else 2, 1, squeeze=False)[:, 0]
    _draw_memory(rows[0], memory)
    if time is not None:
        _draw_time(rows[1], time)
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _title(memory: MemoryPlan) -> str:
    job = memory.job
    name = (job.cfg.model_name_or_path or "a model").rstrip("/").rpartition("/")[2]
    degrees = job.degrees
    return (
        f"{name} on {job.cluster.gpus} x {job.cluster.gpu}: pipeline {degrees.pipeline}, data {degrees.data}, tensor "
        f"{degrees.tensor}, experts {degrees.expert}"
    )


def _draw_memory(axes: Any, memory: MemoryPlan) -> None:
    stages, unit, name = memory.stages, *_unit(memory.worst.capacity)
    places = [stage.stage for stage in stages]
    bottoms = [0.0] * len(stages)
    for kind, color in _COLORS.items():
        sizes = [stage.parts.get(kind, 0.0) / unit for stage in stages]
        if any(sizes):
            axes.bar(places, sizes, 0.7, bottom=bottoms, label=kind, color=color)
            bottoms = [below + size for below, size in zip(bottoms, sizes, strict=True)]
    worst = memory.worst
    axes.axhline(worst.capacity / unit, color="black", linewidth=1, label="device")
    axes.axhline(worst.usable / unit, color="black", linewidth=1, linestyle="--", label="less the reserve")
    axes.set(xlabel="pipeline stage (of each rank)", ylabel=name, title="Memory at the peak of a step")
    axes.set_xticks(places)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_time(axes: Any, time: StepTime) -> None:
    spent = time.seconds_by_kind
    kinds, seconds = list(spent)[::-1], list(spent.values())[::-1]
    bars = axes.barh(kinds, seconds, color="#4269d0")
    axes.bar_label(bars, [f"{value:.3g} s ({value / time.seconds:.0%})" for value in seconds], padding=3, fontsize=8)
    axes.set(xlabel="seconds", title=f"A step of {time.seconds:.3g} s on the slowest stage ({time.slowest})")
    axes.set_xlim(0, max(seconds) * 1.2)


def _unit(size: float) -> tuple[float, str]:
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")
