"""A simulated step as a picture and as a Chrome trace, in the form that profiles have: one process for each pipeline
stage, with a row for computation and one for messages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erniekit.parallel.pipeline_schedule import Backward, Forward, Send
from erniekit.plan.events import Event
from erniekit.utils import atomic

_FORWARD, _BACKWARD, _AFTER, _QUIET = "#2563c9", "#d9480f", "#0f766e", "#9ca3af"
_SHADES = 0.55  # the lightness that alternate chunks take, so that interleaving is visible
COMPUTE_ROW, MESSAGE_ROW = 0, 1
MICROSECONDS = 1e6


def event_name(event: Event) -> str:
    """A short name, such as "forward 3" or "forward 3, chunk 1"."""
    action = event.action
    kind = {Forward: "forward", Backward: "backward"}.get(type(action), "message")
    chunk = f", chunk {action.chunk}" if action.chunk else ""
    return f"{kind} {action.microbatch}{chunk}"


def chrome_trace(events: Sequence[Event], after: Sequence[float], finished: Sequence[float]) -> dict[str, Any]:
    """The events of a step. `after`: seconds of gradient exchange and optimizer of each stage, `finished`: when its
    pipeline is done. Opens in Perfetto and in chrome://tracing.
    """
    rows: list[dict[str, Any]] = []
    for stage in range(len(after)):
        rows.append({"name": "process_name", "ph": "M", "pid": stage, "tid": 0, "args": {"name": f"stage {stage}"}})
        for row, name in ((COMPUTE_ROW, "computation"), (MESSAGE_ROW, "messages")):
            rows.append({"name": "thread_name", "ph": "M", "pid": stage, "tid": row, "args": {"name": name}})
    for event in events:
        is_message = isinstance(event.action, Send)
        rows.append(
            {
                "name": event_name(event),
                "cat": "communication" if is_message else type(event.action).__name__.lower(),
                "ph": "X",
                "ts": event.start * MICROSECONDS,
                "dur": (event.end - event.start) * MICROSECONDS,
                "pid": event.stage,
                "tid": MESSAGE_ROW if is_message else COMPUTE_ROW,
                "args": {"microbatch": event.action.microbatch, "chunk": event.action.chunk},
            }
        )
    for stage, (seconds, start) in enumerate(zip(after, finished)):
        rows.append(
            {
                "name": "gradients and optimizer",
                "cat": "optimizer",
                "ph": "X",
                "ts": float(start) * MICROSECONDS,
                "dur": float(seconds) * MICROSECONDS,
                "pid": stage,
                "tid": COMPUTE_ROW,
                "args": {},
            }
        )
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace as JSON."""
    atomic.write_json(path, trace)


def draw_timeline(
    path: Path, events: Sequence[Event], after: Sequence[float], finished: Sequence[float], title: str
) -> None:
    """Draw a step into a PNG: the whole of it, and its first part larger."""
    # Imported late, since matplotlib takes half a second to import. Without pyplot, a figure needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    end = max(float(start) + seconds for start, seconds in zip(finished, after))
    stages = len(after)
    computing = [event for event in events if isinstance(event.action, Forward | Backward)]
    first = [event.end for event in computing if event.stage == 0 and isinstance(event.action, Backward)]
    zoom = min(end, 2.0 * min(first, default=end))
    spans = [(0.0, end)] if zoom > 0.7 * end else [(0.0, end), (0.0, zoom)]
    figure = Figure(figsize=(12, len(spans) * (1.2 + 0.22 * stages)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(spans), 1, squeeze=False)[:, 0]
    for axes, (left, right) in zip(panels, spans):
        _draw_bars(axes, computing, right)
        for stage, (seconds, start) in enumerate(zip(after, finished)):
            axes.broken_barh([(float(start), seconds)], (stage - 0.42, 0.84), facecolors=_AFTER)
        axes.set_xlim(left, right)
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_ylabel("pipeline stage")
        axes.set_yticks(range(0, stages, max(stages // 8, 1)))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title, loc="left", fontsize=11)
    panels[-1].set_xlabel("seconds" if len(spans) == 1 else "seconds (above: the whole step, below: its beginning)")
    names = {"forward": _FORWARD, "backward": _BACKWARD, "gradients and optimizer": _AFTER}
    handles = [Patch(color=color, label=name) for name, color in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_bars(axes: Any, computing: Sequence[Event], right: float) -> None:
    """One bar for each action; its microbatch in it where there is room."""
    from matplotlib.colors import to_rgb

    bars: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for event in computing:
        color = _FORWARD if isinstance(event.action, Forward) else _BACKWARD
        key = (event.stage, color, event.action.chunk % 2)
        bars.setdefault(key, []).append((event.start, event.end - event.start))
        is_wide = event.end - event.start > right / 90 and event.start < right
        if is_wide:
            middle = (event.start + event.end) / 2
            axes.text(
                middle,
                event.stage,
                event.action.microbatch,
                ha="center",
                va="center",
                fontsize=6,
                color="white",
                clip_on=True,
            )
    for (stage, color, shade), spans in bars.items():
        red, green, blue = to_rgb(color)
        light = _SHADES if shade else 1.0
        face = tuple(1 - light * (1 - part) for part in (red, green, blue))
        axes.broken_barh(spans, (stage - 0.42, 0.84), facecolors=face, edgecolor="white", linewidth=0.15)
