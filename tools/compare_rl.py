"""What each part of the demonstration of reinforcement learning does: the loss, IcePop where generating is rounded, and
dynamic sampling.

    erniekit train examples/configs/tiny/rl/run_sft_ambiguous.yaml
    python tools/compare_rl.py examples/configs/tiny/rl/run_gspo.yaml --steps 40 --seeds 1 2 3

Trains the same model once a variant and seed. Prints, as means over the seeds with standard deviations: greedy accuracy
on the held-out questions on the way and at the end, the reward of all samples in the last rollouts, the entropy there,
the share of tokens or completions that the loss clips, the share of tokens that IcePop masks, the mean of exp(|log k|),
k being a token's probability in training over that in generating, and the prompts that completions were generated for.
Draws compare_rl.png.
`--reuse` keeps the runs that are there, so that single ones can be made at a time (`--only`).
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison

LAST = 5  # rollouts at the end
NARROW = {"icepop_alpha": 0.98, "icepop_beta": 1.02}
ROUNDED = {"rollout_dtype": "bf16"}
VARIANTS: dict[str, dict[str, object]] = {
    "GRPO": {"rl_algorithm": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "rollout_correction": "none"},
    "GSPO": {"rollout_correction": "none"},
    "GSPO without dynamic sampling": {"rollout_correction": "none", "dynamic_sample": False},
    "GSPO, bf16 rollouts": {"rollout_correction": "none"} | ROUNDED,
    "GSPO + IcePop, bf16 rollouts": {"rollout_correction": "icepop"} | ROUNDED,
    "GSPO + IcePop 0.98-1.02, bf16 rollouts": {"rollout_correction": "icepop"} | ROUNDED | NARROW,
}
Records = list[dict[str, Any]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="key=value for every run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--reuse", action="store_true", help="keep the runs that are there")
    parser.add_argument("--out", type=Path, default=Path("demo_output/rl/compare"))
    given = parser.parse_intermixed_args()
    given.out = comparison.ROOT / given.out
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def steps_of(given: argparse.Namespace, name: str, seed: int) -> Records:
    """The steps of a run, which is made unless it is there and may be reused."""
    label = f"{name} {seed}".replace(",", "")
    directory = given.out / label.replace(" ", "_").replace("+", "and")
    if not (given.reuse and (directory / "summary.json").exists()):
        own = {"seed": seed, "evaluation_strategy": "steps", "do_eval": True, "eval_steps": max(1, given.steps // 4)}
        comparison.train(given, label, VARIANTS[name] | own)
    return comparison.records(directory)


def accuracies(steps: Records) -> dict[int, float]:
    """Greedy accuracy on the held-out questions in percent by the number of optimizer steps."""
    return {step["step"]: 100 * step["eval_accuracy"] for step in steps if "eval_accuracy" in step}


def last(key: str) -> Callable[[Records], float]:
    """The mean of a number in the last rollouts that have it."""

    def of(steps: Records) -> float:
        return statistics.mean([step[key] for step in steps if step.get(key) is not None][-LAST:] or [0.0])

    return of


def mean_of(key: str) -> Callable[[Records], float]:
    """The mean of a number over the steps that have it."""
    return lambda steps: statistics.mean([step[key] for step in steps if step.get(key) is not None] or [0.0])


def prompts(steps: Records) -> float:
    """The prompts that completions were generated for."""
    return sum(step.get("sampling/generated_prompts", 0.0) for step in steps)


COLUMNS: dict[str, tuple[Callable[[Records], float], str]] = {
    "reward of samples": (last("reward_generated"), ".2f"),
    "entropy": (last("entropy"), ".3f"),
    "clipped": (mean_of("clip_ratio/region"), ".1%"),
    "masked": (mean_of("rollout/masked_fraction"), ".2%"),
    "probability ratio": (mean_of("rollout/token_mult_prob_error"), ".5f"),
    "prompts": (prompts, ".0f"),
}


def shown(values: list[float], form: str) -> str:
    """The mean of the seeds, and their standard deviation if there are several."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ({format(statistics.stdev(values), form)})"


def draw(runs: dict[str, list[Records]], path: Path) -> None:
    """Greedy accuracy, and the reward of all samples, over the steps: means over the seeds, a line a variant."""
    figure = comparison.figure_of(11, 4.5)
    left, right = figure.subplots(1, 2)
    for name, of_seeds in runs.items():
        points = [accuracies(steps) for steps in of_seeds]
        common = sorted(set.intersection(*map(set, points)))
        left.plot(common, [statistics.mean(each[step] for each in points) for step in common], marker="o", label=name)
        rewards = [{s["step"]: s["reward_generated"] for s in steps if "reward_generated" in s} for steps in of_seeds]
        common = sorted(set.intersection(*map(set, rewards)))
        right.plot(common, [statistics.mean(each[step] for each in rewards) for step in common], label=name)
    left.set_ylabel("greedy accuracy on held-out questions, %")
    right.set_ylabel("reward of all samples")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run every variant, print the table, draw the picture."""
    given = arguments()
    runs = {name: [steps_of(given, name, seed) for seed in given.seeds] for name in given.only}
    draw(runs, given.out / "compare_rl.png")
    moments = sorted(set.union(*(set(accuracies(steps)) for of_seeds in runs.values() for steps in of_seeds)))
    heads = [*(f"accuracy, step {step}" for step in moments), *COLUMNS]
    print(f"\n{given.steps} steps, seeds {', '.join(map(str, given.seeds))}: mean (standard deviation)\n")
    print("| " + " | ".join(["", *heads]) + " |")
    print("| " + " | ".join(["---"] * (1 + len(heads))) + " |")
    for name, of_seeds in runs.items():
        cells = [shown([accuracies(steps).get(step, 0.0) for steps in of_seeds], ".1f") for step in moments]
        cells += [shown([of(steps) for steps in of_seeds], form) for of, form in COLUMNS.values()]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
