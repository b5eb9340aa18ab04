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
CALIBRATION = (
    "quantization_calibration_path=./data/demo/train.jsonl",
    "quantization_calibration_samples=32",
    "quantization_calibration_length=256",
)
QUIET = ("evaluation_strategy=no", "do_eval=false", "save_strategy=no")

# Not an algorithm: the model is trained for the scheme first, then every weight gets its nearest code.
QAT, QAT_STEPS = "qat", 60


class Row(NamedTuple):
    """A scheme with an algorithm, the layout of its files, and the exact match in per cent that the demo asks for."""

    scheme: str
    algorithm: str
    layout: str
    required: float

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.scheme}-{self.algorithm}".replace("/", "-")

    @property
    def calibrates(self) -> bool:
        """Whether the export needs data: for the algorithm, or for the ranges of activations in the file."""
        return self.algorithm not in ("rtn", QAT) or self.scheme == "w4a8"


ROWS = [
    Row("wint8", "rtn", "pt", 97),
    Row("w8a8", "rtn", "pt", 97),
    Row("w8a8", "smoothquant", "pt", 97),
    Row("fp8", "rtn", "pt", 97),
    Row("wint4/8", "rtn", "pt", 96),
    Row("wint4", "rtn", "pt", 95),
    Row("wint4", "awq", "pt", 95),
    Row("wint4", "gptq", "pt", 95),
    Row("wint4", QAT, "pt", 95),
    Row("w4a8", "rtn", "paddle", 95),
    Row("w4a8", "gptq", "paddle", 95),
    Row("wint2", "rtn", "paddle", 95),
    Row("wint2", "gptq", "paddle", 95),
]


def train_for(scheme: str, model: Path, target: Path, overrides: list[str]) -> Path:
    """Train the model further, with the rounding of the scheme."""
    run(
        "train",
        CONFIG,
        f"model_name_or_path={model}",
        "continue_training=true",
        f"output_dir={target}",
        f"qat={scheme}",
        f"max_steps={QAT_STEPS}",
        "learning_rate=3e-4",
        "min_lr=3e-6",
        *QUIET,
        *overrides,
    )
    return target


def report_of(row: Row, model: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Export with this scheme; its report."""
    target, keys = out / row.name, [f"quantization_algorithm={row.algorithm}"]
    if row.algorithm == QAT:
        model, keys = train_for(row.scheme, model, target / "trained", overrides), [f"qat={row.scheme}"]
    run(
        "export",
        CONFIG,
        f"checkpoint={model}",
        f"output_dir={target}",
        f"quantization={row.scheme}",
        *keys,
        f"format={row.layout}",
        "quantization_eval=true",
        "predict_with_generate=true",
        *(CALIBRATION if row.calibrates else ()),
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
    """The model as it was trained, in fp32, then each scheme. Bits are of the quantised weights, with their scales."""
    first = next(iter(reports.values()))
    table = [TITLES, cells("as trained", "", 32, 2 * first["bytes"]["bf16"], first["evaluation"]["before"], "")]
    for row, report in reports.items():
        bits, size = report["bits_per_weight"]["quantised"], report["bytes"]["quantised"]
        routing = f"{100 * report['routing']['unchanged']:.1f} %"
        table.append(cells(row.scheme, row.algorithm, bits, size, report["evaluation"]["after"], routing))
    widths = [max(len(line[column]) for line in table) for column in range(len(TITLES))]
    print()
    for line in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def draw(reports: dict[Row, dict[str, Any]], path: Path) -> None:
    """Perplexity, and the share of tokens with the same experts, against the bits of a weight."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    before = next(iter(reports.values()))["evaluation"]["before"]["perplexity"]
    left.axhline(before, color="#6b7280", linewidth=1, linestyle="--", label="as trained")
    for axes, title in ((left, "perplexity of the answers"), (right, "tokens with the same experts, %")):
        axes.set(xlabel="bits of a quantised weight, with scales", title=title)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    schemes = list(dict.fromkeys(row.scheme for row in reports))
    markers = {"rtn": "o", "gptq": "D", "awq": "^", "smoothquant": "s", QAT: "*"}
    for row, report in reports.items():
        bits, style = report["bits_per_weight"]["quantised"], f"C{schemes.index(row.scheme)}"
        for axes, value in (
            (left, report["evaluation"]["after"]["perplexity"]),
            (right, 100 * report["routing"]["unchanged"]),
        ):
            label = f"{row.scheme}, {row.algorithm}" if axes is left else None
            axes.plot(bits, value, markers[row.algorithm], color=style, markersize=7, alpha=0.85, label=label)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)


def failures(reports: dict[Row, dict[str, Any]], require: float | None) -> list[str]:
    """What is worse than the demo allows."""
    found, after = [], {row: report["evaluation"]["after"] for row, report in reports.items()}
    for row, scores in after.items():
        least = row.required if require is None else require
        if 100 * scores["exact_match"] < least:
            found.append(f"{row.scheme} ({row.algorithm}): exact match below {least:g} %")
    perplexity = {(row.scheme, row.algorithm): scores["perplexity"] for row, scores in after.items()}
    nearest, compensated = perplexity.get(("wint4", "rtn")), perplexity.get(("wint4", "gptq"))
    if nearest is not None and compensated is not None and compensated >= nearest:
        found.append(f"wint4: gptq has a perplexity of {compensated:.4f}, rtn {nearest:.4f}")
    return found


def main() -> None:
    """Parse the arguments, run, print the table, fail if a scheme lost more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", nargs="+", help="only these schemes, such as wint4")
    parser.add_argument("--require", type=float, help="exact match in %% below which any scheme fails")
    parser.add_argument("--model", type=Path, default=Path("demo_output/moe"), help="trained first if it is not there")
    parser.add_argument("--out", type=Path, default=Path("demo_output/quantise"))
    parser.add_argument("overrides", nargs="*", help="key=value for every command, e.g. max_evaluate_steps=5")
    args = parser.parse_intermixed_args()
    started = time.monotonic()
    if not (ROOT / args.model / "model.safetensors").exists():
        run("train", CONFIG, f"output_dir={args.model}", "overwrite_output_dir=true", *QUIET, *args.overrides)
    shutil.rmtree(ROOT / args.out, ignore_errors=True)
    rows = [row for row in ROWS if args.schemes is None or row.scheme in args.schemes]
    reports = {row: report_of(row, args.model, args.out, args.overrides) for row in rows}
    print_table(reports)
    draw(reports, ROOT / args.out / "quantise.png")
    print(
        f"\nThe whole demo took {time.monotonic() - started:.0f} s. Pictures: {args.out}/quantise.png, and beside each"
    )
    print("model export/quantization_report.png.")
    if missed := failures(reports, args.require):
        sys.exit(f"demo-quantise: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
