"""AdamW and Muon at equal tokens: the evaluation loss of a model from a random start, for several learning rates each.

    python tools/compare_optimizers.py examples/configs/tiny/sft/run_sft_dense.yaml --steps 200
    python tools/compare_optimizers.py x.yaml --rates 1e-3 3e-3 1e-2 batch_size=4

Every run has the same data in the same order, the same schedule and the same start. Prints a table and draws
optimizers.png: the evaluation losses over the learning rates, and the training losses of the best run of each. The
times are those of the clock, so that they are of use on a quiet machine only.
"""

import argparse
import json
from pathlib import Path

import comparison
import numpy as np
from compare_qat import ROOT, run


def loss_of(given: argparse.Namespace, target: Path, optim: str, rate: float) -> tuple[float, float]:
    """(evaluation loss, seconds of the training) of one run."""
    keys = {
        "max_steps": given.steps,
        "output_dir": target,
        "optim": optim,
        "learning_rate": rate,
        "min_lr": rate / 100,
        "continue_training": False,
        "save_strategy": "no",
        "evaluation_strategy": "no",
        "do_eval": False,
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": given.steps,
    }
    done = target / "summary.json"
    if not (given.reuse and done.exists() and json.loads(done.read_text())["steps"] == given.steps):
        run("train", given, keys)
    results = target / "evaluation"
    run("eval", given, {"checkpoint": target, "eval_output": results})
    loss = json.loads((results / "eval_results.json").read_text())["loss"]
    return loss, json.loads(done.read_text())["step_seconds"]


def draw(rows: list[tuple[str, float, float, float]], curves: dict[str, np.ndarray], path: Path) -> None:
    """Evaluation losses over learning rates on the left; on the right the training losses of the best run of each
    optimizer, averaged over a fortieth of the steps.
    """
    figure = comparison.figure_of(9, 3.6)
    left, right = figure.subplots(1, 2)
    for optim in dict.fromkeys(row[0] for row in rows):
        mine = sorted(row[1:3] for row in rows if row[0] == optim)
        left.plot(*zip(*mine, strict=True), marker="o", markersize=4, linewidth=1, label=optim)
    for name, curve in curves.items():
        right.plot(*comparison.averaged(curve, max(1, len(curve) // 40)), linewidth=1, label=name)
    left.set(xscale="log", xlabel="learning rate", ylabel="evaluation loss")
    right.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Parse the arguments, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--optims", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--out", type=Path, default=Path("demo_output/optimizers"))
    parser.add_argument("--reuse", action="store_true", help="do not repeat runs that are complete in --out")
    parser.set_defaults(data={})
    args = parser.parse_intermixed_args()
    rows = []
    for rate in args.rates:
        for optim in args.optims:
            target = ROOT / args.out / f"{optim}-{rate:g}"
            rows.append((optim, rate, *loss_of(args, target, optim, rate)))
    best = {optim: min((row for row in rows if row[0] == optim), key=lambda row: row[2]) for optim in args.optims}
    curves = {
        f"{optim}, {row[1]:g}": comparison.losses(ROOT / args.out / f"{optim}-{row[1]:g}")
        for optim, row in best.items()
    }
    draw(rows, curves, ROOT / args.out / "optimizers.png")
    print(f"\n{args.steps} steps\n| optim | learning_rate | evaluation loss | seconds |\n|---|---|---|---|")
    for optim, rate, loss, seconds in sorted(rows):
        print(f"| {optim} | {rate:g} | {loss:.4f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
