"""How well each way of balancing spreads the load, and what the orthogonal loss does to the routers, on a real run.

    python tools/compare_balancing.py examples/configs/tiny/pretrain/stage1_text.yaml --steps 200 --out
    demo_output/balancing

Trains the same model on the same rows once a variant and prints: the busiest expert's load over the mean load in the
last 50 steps (mean and worst over layers), idle experts, the language loss, and the routers' mean absolute cosine
between experts. Draws balancing.png.
"""

from pathlib import Path

import comparison
import numpy as np

LAST = 50
OFF = {
    "moe_use_aux_free": False,
    "moe_aux_loss_lambda": 0.0,
    "moe_orthogonal_loss_lambda": 0.0,
    "moe_z_loss_lambda": 0.0,
}
VARIANTS: dict[str, dict[str, object]] = {
    "none": {},
    "loss": {"moe_aux_loss_lambda": 0.01},
    "loss-free bias": {"moe_use_aux_free": True},
    "both": {"moe_aux_loss_lambda": 0.001, "moe_use_aux_free": True},
    "both + orthogonal": {"moe_aux_loss_lambda": 0.001, "moe_use_aux_free": True, "moe_orthogonal_loss_lambda": 0.1},
}


def mean_cosine(directory: Path) -> float:
    """Mean absolute cosine between the gate vectors of two experts, over pairs and layers."""
    import erniekit

    model = erniekit.load_model(str(directory))
    values = []
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            unit = parameter.numpy() / np.linalg.norm(parameter.numpy(), axis=0)
            values.append(np.abs(unit.T @ unit)[np.triu_indices(unit.shape[1], k=1)].mean())
    return float(np.mean(values))


def read(directory: Path) -> dict[str, object]:
    """One variant's numbers."""
    routers = [record["layers"] for record in comparison.records(directory, "routers.jsonl")]
    worst = np.array([[layer["load_max_over_mean"] for layer in step.values()] for step in routers])
    idle = np.array([[layer["idle_experts"] for layer in step.values()] for step in routers])
    return {
        "curve": worst.mean(axis=1),
        "load": worst[-LAST:].mean(),
        "load_worst": worst[-LAST:].max(),
        "idle": idle[-LAST:].mean(),
        "loss": float(np.mean(comparison.losses(directory, "loss_lm")[-LAST:])),
        "cosine": mean_cosine(directory),
    }


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    """Load over time, a line a variant."""
    figure = comparison.figure_of(9, 4.5)
    axes = figure.subplots()
    for name, result in results.items():
        axes.plot(range(1, len(result["curve"]) + 1), result["curve"], linewidth=1.4, label=name)
    axes.axhline(1.0, color="#9ca3af", linewidth=0.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("max / mean expert load, mean over layers")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Parse the arguments, run every variant, print the table."""
    given = comparison.arguments(__doc__, 200, "demo_output/balancing")
    results = {}
    for name, keys in VARIANTS.items():
        directory = comparison.train(given, name, {"lr_scheduler_type": "cosine"} | OFF | keys)
        results[name] = read(directory)
    draw(results, given.out / "balancing.png")
    print(f"\nlast {LAST} of {given.steps} steps")
    print("| balancing | max/mean load | worst layer and step | idle experts | loss | mean abs. cosine |")
    print("|---|---|---|---|---|---|")
    for name, r in results.items():
        numbers = f"{r['load']:.2f} | {r['load_worst']:.2f} | {r['idle']:.1f} | {r['loss']:.3f} | {r['cosine']:.3f}"
        print(f"| {name} | {numbers} |")


if __name__ == "__main__":
    main()
