"""Draws quantization_report.png from the report: errors by layer and kind, bytes, and what the evaluation found."""

from pathlib import Path
from typing import Any

# Kinds in the order of the legend. Colours that stay apart for colour-blind readers, and markers for those who print.
_KINDS = {
    "attention": ("#2563c9", "o"),
    "mlp": ("#d97706", "s"),
    "shared_experts": ("#7c3aed", "^"),
    "experts": ("#059669", "D"),
    "vision_experts": ("#db2777", "v"),
}
_GREY = "#6b7280"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG file."""
    # Imported late: matplotlib takes half a second. Without pyplot, a figure needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    routes = report.get("routing", {}).get("by_layer", {})
    figure = Figure(figsize=(10, 6.4 if routes else 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=12, fontweight="bold")
    rows = figure.subplots(
        2 if routes else 1, 2, squeeze=False, width_ratios=[2.6, 1], height_ratios=[1.6, 1] if routes else [1]
    )
    _draw_errors(rows[0][0], report["error"]["by_layer"])
    _draw_bytes(rows[0][1], report)
    if routes:
        _draw_routes(rows[1][0], report["routing"])
        rows[1][1].axis("off")
        _write_table(rows[1][1], report)
    for axes in rows.flat:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, format="png")


def _title(report: dict[str, Any]) -> str:
    bits = report["bits_per_weight"]
    return (
        f"{report['scheme']}, {report['algorithm']}: {bits['quantised']:.3g} bits a quantised weight, "
        f"{bits['model']:.3g} bits over the whole model"
    )


def _draw_errors(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The error of each kind by layer, with a thin line up to the worst matrix."""
    layers = sorted({row["layer"] for row in rows})
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
    for number, kind in enumerate(kinds):
        # Kinds stand beside one another, so that none hides another.
        offset = (number - (len(kinds) - 1) / 2) * 0.16
        _draw_kind(axes, kind, [row for row in rows if row["kind"] == kind], offset)
    axes.set_ylim(bottom=0)
    axes.set_xticks(layers if len(layers) <= 16 else layers[:: len(layers) // 12])
    axes.set_xlabel("layer")
    axes.set_ylabel("error, %")
    hollow = "; hollow: of the outputs" if any("output_error" in row for row in rows) else ""
    axes.set_title(f"|W' - W| / |W|; lines reach up to the worst matrix{hollow}", loc="left", fontsize=10)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=min(3, len(kinds) or 1))


def _draw_kind(axes: Any, kind: str, rows: list[dict[str, Any]], offset: float) -> None:
    """The rows of one kind, `offset` beside their layers."""
    color, marker = _KINDS[kind]
    places = [row["layer"] + offset for row in rows]
    errors, worst = ([100 * row[key] for row in rows] for key in ("error", "worst_error"))
    axes.vlines(places, errors, worst, color=color, linewidth=1, alpha=0.6)
    bits = sorted({round(row["bits"], 2) for row in rows})
    label = f"{kind.replace('_', ' ')} ({' and '.join(f'{value:g}' for value in bits)} bits)"
    axes.plot(places, errors, marker, markersize=5, color=color, label=label)
    known = [row for row in rows if "output_error" in row]
    outputs = [100 * row["output_error"] for row in known]
    axes.plot([row["layer"] + offset for row in known], outputs, marker, markersize=5, color=color, fillstyle="none")


def _draw_bytes(axes: Any, report: dict[str, Any]) -> None:
    sizes = report["bytes"]
    unit, name = _unit(sizes["bf16"])
    values = [sizes["bf16"] / unit, sizes["quantised"] / unit]
    bars = axes.bar(["bf16", report["scheme"]], values, 0.6, color=["#c7cbd1", "#2563c9"])
    axes.bar_label(bars, [f"{value:.3g} {name}" for value in values], padding=3, fontsize=9)
    axes.set_ylim(0, max(values) * 1.15)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"weight files: {sizes['quantised'] / sizes['bf16']:.0%}", loc="left", fontsize=10)
    if "evaluation" in report and "routing" not in report:
        axes.text(0, -0.12, _lines(report), transform=axes.transAxes, va="top", fontsize=9, family="monospace")


def _draw_routes(axes: Any, routing: dict[str, Any]) -> None:
    names, shares = list(routing["by_layer"]), [100 * share for share in routing["by_layer"].values()]
    places = range(len(names))
    bars = axes.bar(places, shares, 0.6, color="#059669")
    if len(names) <= 16:
        axes.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=8)
    step = 1 if len(names) <= 16 else len(names) // 12
    axes.set_xticks(list(places)[::step], names[::step])
    axes.set_ylim(0, 112)
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens, %")
    axes.set_title(
        f"tokens whose experts are the same as before: {routing['unchanged']:.1%} "
        f"({routing['kept']:.1%} of all choices stay)",
        loc="left",
        fontsize=10,
    )


def _write_table(axes: Any, report: dict[str, Any]) -> None:
    axes.text(0, 1, _lines(report), transform=axes.transAxes, va="top", fontsize=9, family="monospace")


def _lines(report: dict[str, Any]) -> str:
    """The metrics before and after, as a table of text."""
    before, after = (report["evaluation"][when] for when in ("before", "after"))
    lines = [f"{'':<14}{'before':>9}{'after':>9}"]
    for key, form in (("loss", ".4f"), ("perplexity", ".5g"), ("token_accuracy", ".1%"), ("exact_match", ".1%")):
        if key in before and key in after:
            lines.append(f"{key.replace('_', ' '):<14}{before[key]:>9{form}}{after[key]:>9{form}}")
    if "calibration" in report:
        experts = [tokens for layer in report["calibration"]["expert_tokens"].values() for tokens in layer]
        lines.append(f"\n{report['calibration']['tokens']:,} calibration tokens")
        lines += [f"{min(experts):,} to {max(experts):,} for an expert"] if experts else []
    return "\n".join(lines)


def _unit(size: float) -> tuple[float, str]:
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")
