"""The same training in fp32, bf16 and FP8 from one seed: how far the losses are apart.

    python tools/compare_fp8.py examples/configs/tiny/sft/run_sft_moe.yaml batch_size=2 --steps 500

Trains the model once a precision on the same rows in the same order; 16 and 8 bits are emulated on a CPU. Prints the
training loss over the last 50 steps and the evaluation loss of each, and the shares of FP8 values that saturate and
that become zero; draws fp8.png, the losses and their distance from fp32.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LAST = 50  # steps over which the training loss is averaged
SIXTEEN = {"compute_type": "bf16", "emulate_precision": True}
EIGHT = SIXTEEN | {"fp8": "blockwise"}
VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"compute_type": "fp32"},
    "bf16": SIXTEEN,
    "FP8 experts": EIGHT,
    "FP8 everywhere": EIGHT | {"fp8_modules": "experts,shared_experts,mlp,attention"},
}
COLOURS = ("#111827", "#2563c9", "#d9480f", "#0f766e")


def train(config: str, keys: list[str], variant: dict[str, object], steps: int, target: Path) -> None:
    """Train one variant into `target`."""
    given = {
        "max_steps": steps,
        "save_strategy": "no",
        "do_eval": True,
        "evaluation_strategy": "no",
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": 50,
        "fp8_statistics_steps": max(steps // 10, 1) if "fp8" in variant else 0,
        "output_dir": target,
    }
    words = [f"{key}={value}" for key, value in (given | variant).items()]
    command = [sys.executable, "-m", "erniekit", "train", config, *keys, *words]
    subprocess.run(command, cwd=ROOT, check=True)


def read(directory: Path) -> dict[str, object]:
    """One variant's losses by step, its evaluation loss, and its mean shares in FP8."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([record["loss"] for record in records if "loss" in record])
    names = sorted({name for record in records for name in record if name.startswith("fp8_")})
    shares = {name: float(np.mean([record[name] for record in records if name in record])) for name in names}
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {"losses": losses, "last": losses[-LAST:].mean(), "eval": evaluated[-1], "shares": shares}


def averaged(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, means over the `width` steps that end there)."""
    width = min(width, len(values))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, "valid")


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    """Losses over the steps, and below them their relative distance from the first variant's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    base = next(iter(results.values()))["losses"]
    for (name, result), colour in zip(results.items(), COLOURS):
        upper.plot(*averaged(result["losses"], 10), linewidth=1.3, color=colour, label=name)
        distance = (averaged(result["losses"], LAST)[1] / averaged(base, LAST)[1] - 1) * 100
        lower.plot(averaged(base, LAST)[0], distance, linewidth=1.3, color=colour)
    upper.set_ylabel("training loss, mean of 10 steps")
    upper.legend(frameon=False)
    lower.set_ylabel(f"% from {next(iter(results))}, mean of {LAST} steps")
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def main() -> None:
    """Parse the arguments, train every variant, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every variant")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("demo_output/fp8"))
    args = parser.parse_args()
    results = {}
    for name, variant in VARIANTS.items():
        target = ROOT / args.out / name.replace(" ", "_")
        train(args.config, args.keys, variant, args.steps, target)
        results[name] = read(target)
    draw(results, ROOT / args.out / "fp8.png")
    base = results["fp32"]
    print(f"\n{args.steps} steps; training loss: mean of the last {LAST}")
    print("| precision | training loss | from fp32 | evaluation loss | from fp32 |")
    print("|---|---|---|---|---|")
    for name, r in results.items():
        train_distance, eval_distance = (r[key] / base[key] - 1 for key in ("last", "eval"))
        print(f"| {name} | {r['last']:.4f} | {train_distance:+.2%} | {r['eval']:.4f} | {eval_distance:+.2%} |")
    print("\n| FP8 | kind | at the largest value | became zero |\n|---|---|---|---|")
    for name, r in results.items():
        for kind in ("activations", "weights", "gradients") if r["shares"] else ():
            saturated, zeroed = (r["shares"][f"fp8_{share}_{kind}"] for share in ("saturated", "zeroed"))
            print(f"| {name} | {kind} | {saturated:.4%} | {zeroed:.4%} |")


if __name__ == "__main__":
    main()
