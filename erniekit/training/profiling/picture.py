"""profile.png: the parts of a step, the kinds of time of each rank, and the ranks' last step over time."""

from pathlib import Path
from typing import Any

from erniekit.training.profiling.recorder import BACKWARD, COMMUNICATION, DATA, FORWARD, OPTIMIZER, RECOMPUTE
from erniekit.training.profiling.report import KINDS, Profile, by_part, by_rank, kinds_in_order, summary
from erniekit.utils import plot_text

COLORS = {
    FORWARD: "#2563c9",
    RECOMPUTE: "#93b8f0",
    BACKWARD: "#0f766e",
    OPTIMIZER: "#9333ea",
    COMMUNICATION: "#d9480f",
    DATA: "#b45309",
    "host": "#9ca3af",
}
_MAX_RANKS = 16  # rows of the lower panels
_MAX_PARTS = 18


@plot_text.in_any_script()
def draw(profile: Profile, path: Path, title: str) -> None:
    """Draw a profile into a PNG."""
    # Imported late, since matplotlib takes half a second to import. Without pyplot, a figure needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = profile.ranks[:_MAX_RANKS]
    parts = list(by_part(profile).items())[:_MAX_PARTS]
    heights = [0.8 + 0.28 * len(parts), 1.0 + 0.28 * len(ranks), 1.0 + 0.28 * len(ranks)]
    figure = Figure(figsize=(10, 1.2 + sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, middle, lower = figure.subplots(3, 1, height_ratios=heights)
    _draw_parts(upper, parts)
    upper.set_title(f"{title}\n{summary(profile)[0]}", loc="left", fontsize=10, parse_math=False)
    _draw_ranks(middle, profile, len(ranks))
    _draw_time(lower, profile, len(ranks))
    for axes in (upper, middle, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color="#9ca3af", alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
    used = [kind for kind in KINDS if any(times[kind] > 0 for times in by_rank(profile).values())]
    handles = [_patch(kind) for kind in used]
    figure.legend(handles, used, loc="outside lower center", ncols=len(used), frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _patch(kind: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=COLORS[kind])


def _draw_parts(axes: Any, parts: list[tuple[str, dict[str, float]]]) -> None:
    total = sum(sum(times.values()) for _, times in parts)
    for row, (_, times) in enumerate(parts):
        left = 0.0
        for kind in (*KINDS, *sorted(times.keys() - set(KINDS))):
            if kind in times:
                axes.barh(row, times[kind] * 1e3, left=left, color=COLORS.get(kind, COLORS["host"]))
                left += times[kind] * 1e3
        axes.text(left, row, f" {sum(times.values()) / total:.1%}", va="center", fontsize=8)
    axes.set_yticks(range(len(parts)), [name for name, _ in parts], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms a step, mean of all ranks", fontsize=9)


def _draw_ranks(axes: Any, profile: Profile, count: int) -> None:
    for row, (_, times) in enumerate(list(by_rank(profile).items())[:count]):
        left = 0.0
        for kind in KINDS:
            axes.barh(row, times[kind] * 1e3, left=left, color=COLORS[kind])
            left += times[kind] * 1e3
    _name_ranks(axes, profile, count)
    axes.set_xlabel("ms a step", fontsize=9)


def _draw_time(axes: Any, profile: Profile, count: int) -> None:
    """The ranks' kinds of time in the last step, side by side."""
    begin = min(rank.origin + rank.last_step for rank in profile.ranks[:count])
    for row, rank in enumerate(profile.ranks[:count]):
        for kind, start, end in kinds_in_order(rank.intervals):
            left = (rank.origin + start - begin) * 1e3
            if left + (end - start) * 1e3 > 0:
                axes.barh(row, (end - start) * 1e3, left=left, color=COLORS[kind])
    axes.set_xlim(left=0)
    _name_ranks(axes, profile, count)
    axes.set_xlabel("ms, the last step", fontsize=9)


def _name_ranks(axes: Any, profile: Profile, count: int) -> None:
    axes.set_yticks(range(count), [f"rank {rank.rank}" for rank in profile.ranks[:count]], fontsize=8)
    axes.invert_yaxis()
