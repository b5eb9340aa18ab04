"""The same training in fp32, bf16 and FP8 from one seed: how far the losses are apart.

    python tools/compare_fp8.py examples/configs/tiny/sft/run_sft_moe.yaml batch_size=2 --steps 500

Trains the model once a precision on the same rows in the same order; 16 and 8 bits are emulated on a CPU. Prints the
training loss over the last 50 steps and the evaluation loss of each, and the shares of FP8 values that saturate and
that become zero; draws fp8.png, the losses and their distance from fp32.
"""

from pathlib import Path

import comparison
import numpy as np

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


def read(directory: Path) -> dict[str, object]:
    """One variant's losses by step, its evaluation loss, and its mean shares in FP8."""
    records, losses = comparison.records(directory), comparison.losses(directory)
    names = sorted({name for record in records for name in record if name.startswith("fp8_")})
    shares = {name: float(np.mean([record[name] for record in records if name in record])) for name in names}
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {"losses": losses, "last": losses[-LAST:].mean(), "eval": evaluated[-1], "shares": shares}


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    """Losses over the steps, and below them their relative distance from the first variant's."""
    base, first = next(iter(results)), next(iter(results.values()))["losses"]
    figure = comparison.figure_of(9, 6.5)
    upper, lower = comparison.loss_and_distance(figure, base)
    for (name, result), colour in zip(results.items(), COLOURS):
        upper.plot(*comparison.averaged(result["losses"], 10), linewidth=1.3, color=colour, label=name)
        steps, means = comparison.averaged(result["losses"], LAST)
        lower.plot(steps, (means / comparison.averaged(first, LAST)[1] - 1) * 100, linewidth=1.3, color=colour)
    upper.set_ylabel("training loss, mean of 10 steps")
    upper.legend(frameon=False)
    lower.set_ylabel(f"% from {base}, mean of {LAST} steps")
    figure.savefig(path)


def main() -> None:
    """Parse the arguments, train every variant, print the table."""
    given = comparison.arguments(__doc__, 500, "demo_output/fp8")
    results = {}
    for name, variant in VARIANTS.items():
        statistics = {"fp8_statistics_steps": max(given.steps // 10, 1)} if "fp8" in variant else {}
        results[name] = read(comparison.train(given, name, {"do_eval": True} | statistics | variant))
    draw(results, given.out / "fp8.png")
    base = results["fp32"]
    print(f"\n{given.steps} steps; training loss: mean of the last {LAST}")
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
