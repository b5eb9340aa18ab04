"""One trained model through every scheme of quantisation on a CPU, as `make demo-quantise` runs it: export, then
evaluate what was written; one table and one picture.

Every step is a command a user can type; each is printed before it runs. The model is that of `make demo`, or trained
first if it is not there. Activations stay in fp32: what engines do to those (w8a8, fp8, w4a8) is not in the numbers.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from demo import ROOT, run

CONFIG = "examples/configs/tiny/sft/run_sft_moe.yaml"
MODEL, OUTPUT = Path("demo_output/moe"), Path("demo_output/quantise")


class Row(NamedTuple):
    """A scheme with an algorithm, the layout of its files, further keys, and what the demo asks of it: exact match
    in per cent, at least.
    """

    scheme: str
    algorithm: str
    layout: str = "pt"
    required: float = 0.0
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.scheme}-{self.algorithm}".replace("/", "-")


ROWS = [
    Row("wint8", "rtn", required=97),
    Row("wint4/8", "rtn", required=80),
    Row("wint4", "rtn", required=70),
]


def report_of(row: Row, overrides: list[str]) -> dict[str, Any]:
    """Export with this scheme; its report."""
    target = OUTPUT / row.name
    run(
        "export",
        CONFIG,
        f"checkpoint={MODEL}",
        f"output_dir={target}",
        f"quantization={row.scheme}",
        f"format={row.layout}",
        "quantization_eval=true",
        "predict_with_generate=true",
        *row.keys,
        *overrides,
    )
    report: dict[str, Any] = json.loads((ROOT / target / "export" / "quantization_report.json").read_text())
    return report


def cells(scheme: str, algorithm: str, bits: float, size: float, scores: dict[str, Any], routing: str) -> list[str]:
    """A row of the table."""
    return [
        scheme,
        algorithm,
        f"{bits:.2f}",
        f"{size / 1e6:.2f} MB",
        f"{scores['perplexity']:.4f}",
        f"{100 * scores['exact_match']:.1f} %",
        routing,
    ]


TITLES = ["scheme", "algorithm", "bits a weight", "files", "perplexity", "exact match", "same experts"]


def print_table(reports: dict[Row, dict[str, Any]]) -> None:
    """The model as it was trained, then each scheme. Bits are of the quantised weights, with their scales."""
    first = next(iter(reports.values()))
    table = [TITLES, cells("bf16", "", 16, first["bytes"]["bf16"], first["evaluation"]["before"], "")]
    for row, report in reports.items():
        bits, size = report["bits_per_weight"]["quantised"], report["bytes"]["quantised"]
        routing = f"{100 * report['routing']['unchanged']:.1f} %"
        table.append(cells(row.scheme, row.algorithm, bits, size, report["evaluation"]["after"], routing))
    widths = [max(len(line[column]) for line in table) for column in range(len(TITLES))]
    print()
    for line in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def draw(reports: dict[Row, dict[str, Any]], path: Path) -> None:
    """Exact match, and the share of tokens with the same experts, against the bits of a weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    before = next(iter(reports.values()))["evaluation"]["before"]["exact_match"]
    left.axhline(100 * before, color="#9ca3af", linewidth=1, linestyle="--")
    for axes, title in ((left, "exact match, %"), (right, "tokens with the same experts, %")):
        axes.set(xlabel="bits of a quantised weight, with scales", title=title)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for number, (row, report) in enumerate(reports.items()):
        bits = report["bits_per_weight"]["quantised"]
        marker = "os^Dv<>P*X"[number % 10]
        label = f"{row.scheme}, {row.algorithm}"
        left.plot(bits, 100 * report["evaluation"]["after"]["exact_match"], marker, color=f"C{number}", label=label)
        right.plot(bits, 100 * report["routing"]["unchanged"], marker, color=f"C{number}")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)


def main() -> None:
    """Parse the arguments, run, print the table, fail if a scheme lost more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", help="only these schemes, such as wint4")
    parser.add_argument("--require", type=float, help="exact match in %% below which any scheme fails")
    parser.add_argument("overrides", nargs="*", help="key=value for every export, e.g. max_evaluate_steps=5")
    args = parser.parse_intermixed_args()
    started = time.monotonic()
    if not (ROOT / MODEL / "model.safetensors").exists():
        run("train", CONFIG, "overwrite_output_dir=true", "evaluation_strategy=no", "do_eval=false")
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    rows = [row for row in ROWS if args.schemes is None or row.scheme in args.schemes]
    reports = {row: report_of(row, args.overrides) for row in rows}
    print_table(reports)
    draw(reports, ROOT / OUTPUT / "quantise.png")
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s. Pictures: {OUTPUT}/quantise.png, and one beside")
    print(f"each model, {OUTPUT}/*/export/quantization_report.png.")
    missed = [
        f"{row.scheme} ({row.algorithm})"
        for row, report in reports.items()
        if 100 * report["evaluation"]["after"]["exact_match"]
        < (args.require if args.require is not None else row.required)
    ]
    if missed:
        sys.exit(f"demo-quantise: too few exact answers: {', '.join(missed)}")


if __name__ == "__main__":
    main()
