"""Reinforcement learning end to end on a CPU, as `make demo-rl` runs it: SFT leaves a tiny mixture of experts with a
right and a wrong habit, then GSPO with IcePop and dynamic difficulty sampling chooses the right one, with three seeds.

Every step is a command a user can type; each is printed before it runs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from demo import ROOT, print_table, run

SFT, RL = "examples/configs/tiny/rl/run_sft_ambiguous.yaml", "examples/configs/tiny/rl/run_gspo.yaml"
OUTPUT = "demo_output/rl"
QUESTION = "Sort: 7 3 9 1 4"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(name: str, *words: str) -> dict[str, Any]:
    """What `erniekit eval` says of the likeliest completions of the held-out questions."""
    folder = f"{OUTPUT}/eval_{name}"
    run("eval", RL, f"eval_output={folder}", *words)
    return json.loads((ROOT / folder / "eval_results.json").read_text())


def train(seed: int, extra: list[str]) -> Path:
    """Reinforcement learning with one seed; returns its directory."""
    folder = f"{OUTPUT}/gspo_seed{seed}"
    run("train", RL, f"seed={seed}", f"output_dir={folder}", "overwrite_output_dir=true", *extra)
    return ROOT / folder


def row(name: str, result: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, str]:
    """A row of the table: the evaluation, and what the rollouts of a run said at its end."""

    def last(key: str) -> str:
        values = [step[key] for step in steps if step.get(key) is not None][-5:]
        return f"{statistics.mean(values):.3g}" if values else "-"

    return {
        "model": name,
        "greedy accuracy": f"{100 * result['accuracy']:.1f} %",
        "reward of samples": last("reward_generated"),
        "tokens": f"{result['completion_length']:.1f}",
        "entropy": last("entropy"),
        "tokens masked by IcePop": last("rollout/masked_fraction"),
        "groups that teach": last("sampling/accept_rate"),
    }


def show_samples(directory: Path) -> None:
    """Sample answers at the beginning, in the middle and at the end."""
    samples = lines_of(directory / "samples.jsonl")
    steps = sorted({sample["step"] for sample in samples})
    print("\nSample answers (the right ones have reward 1):")
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        for sample in [sample for sample in samples if sample["step"] == step][:24:8]:
            question = sample["prompt"][-1]["content"]
            print(f"  step {step:3d}  {question} -> {sample['completion']:8} reward {sample['reward']:.0f}")


def draw(curves: dict[int, list[tuple[int, float]]], path: Path) -> None:
    """Greedy accuracy on the held-out questions over the steps of each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for seed, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"seed {seed}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("greedy accuracy, held-out questions")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Run, print the table and samples, draw the curves, fail if a seed did not learn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require", type=float, default=90.0, help="accuracy in %% below which the demo fails")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--keep-sft", action="store_true", help="start from demo_output/rl/sft instead of training it")
    parser.add_argument("words", nargs="*", help="further key=value for the training")
    args = parser.parse_args()
    started = time.monotonic()
    if not args.keep_sft:
        run("train", SFT, "overwrite_output_dir=true")
    before = evaluated("before", f"checkpoint={OUTPUT}/sft")
    rows, accuracies = [row("after SFT", before, [])], []
    curves: dict[int, list[tuple[int, float]]] = {}
    directories = []
    for seed in args.seeds:
        directory = train(seed, args.words)
        directories.append(directory)
        steps = lines_of(directory / "metrics.jsonl")
        after = evaluated(f"seed{seed}", f"output_dir={directory.relative_to(ROOT)}")
        accuracies.append(100 * after["accuracy"])
        points = [(step["step"], step["eval_accuracy"]) for step in steps if "eval_accuracy" in step]
        curves[seed] = [(0, before["accuracy"]), *points]
        rows.append(row(f"GSPO, seed {seed}", after, [step for step in steps if "loss" in step]))
    show_samples(directories[0])
    run("chat", RL, f"output_dir={directories[0].relative_to(ROOT)}", "temperature=0", stdin=f"{QUESTION}\n")
    print_table(rows)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(
        f"\ngreedy accuracy {100 * before['accuracy']:.1f} % -> {statistics.mean(accuracies):.1f} % (standard "
        f"deviation {spread:.1f} over {len(accuracies)} seeds)"
    )
    draw(curves, ROOT / OUTPUT / "accuracy.png")
    print(f"Curves: {OUTPUT}/accuracy.png, and reward.png and rollout.png in each run's directory.")
    print(f"The whole demo took {time.monotonic() - started:.0f} s. Its output is in {OUTPUT}/.")
    if min(accuracies) < args.require:
        sys.exit(f"demo-rl: a seed has less than {args.require:.0f} % right answers")


if __name__ == "__main__":
    main()
