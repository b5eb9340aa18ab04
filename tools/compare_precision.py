"""What 16-bit types and the storage of AdamW's moments do to the loss of one run: a table and a picture.

    python tools/compare_precision.py examples/configs/tiny/sft/run_sft_moe.yaml --steps 20 --out demo_output/precision
    python tools/compare_precision.py examples/configs/tiny/sft/run_sft_dense.yaml --steps 500 --what optimizer --out
    demo_output/optimizer batch_size=1 max_seq_len=64 adam_beta2=0.999

Trains the same model on the same rows once a variant, from one seed; keys in front of which no option stands are given
to every run. Prints for each the largest distance of a step's loss from that of the first variant, the mean loss of the
last tenth of the steps and its distance in per cent, and the bytes of the optimizer's state for each parameter. Draws
losses.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EMULATED = {"emulate_precision": True}
PRECISION: dict[str, dict[str, object]] = {
    "fp32": {"compute_type": "fp32"},
    "bf16": {"compute_type": "bf16"} | EMULATED,
    "fp16": {"compute_type": "fp16"} | EMULATED,
}
# Host memory for the state (offload_optim) changes no bit: tests/unit/training/test_state_home.py.
OPTIMIZER: dict[str, dict[str, object]] = {
    "fp32 moments": {},
    "bf16 moments": {"moment_dtype": "bf16"},
    "8-bit moments": {"moment_dtype": "8bit"},
}


def train(config: str, name: str, keys: dict[str, object], given: list[str], steps: int, out: Path) -> Path:
    """Train one variant into a directory of its own."""
    target = out / name.replace(" ", "_").replace(",", "")
    fixed = {
        "max_steps": steps,
        "lr_scheduler_type": "cosine",
        "evaluation_strategy": "no",
        "do_eval": False,
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "disable_tqdm": True,
        "logging_steps": 100,
        "output_dir": target,
    }
    overrides = [f"{key}={value}" for key, value in (fixed | keys).items()]
    subprocess.run([sys.executable, "-m", "erniekit", "train", config, *given, *overrides], cwd=ROOT, check=True)
    return target


def losses(directory: Path) -> np.ndarray:
    """The loss of each step."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records if "loss" in record])


def bytes_a_parameter(config: str, keys: dict[str, object]) -> float:
    """Of the optimizer's state, by formula."""
    from erniekit import config as configuration
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.parallel.memory import state_bytes
    from erniekit.parallel.zero import ShardedParameters
    from erniekit.precision import policy

    cfg = configuration.load(config, {"output_dir": "unused"} | keys, "train")
    model = CausalLM(ModelConfig.from_dir(ROOT / str(cfg.model_name_or_path)))
    policy.apply(model, policy.choose(cfg.compute_type, "cpu", cfg.emulate_precision))
    entries = ShardedParameters.single(model.named_parameters()).entries.values()
    return state_bytes(entries, moment_dtype=cfg.moment_dtype) / sum(entry.size for entry in entries)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Losses above, their distances from the first variant below, both averaged over a twentieth of the steps."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    first = next(iter(curves.values()))
    width = max(1, len(first) // 20)
    for name, curve in curves.items():
        smooth, distance = (np.convolve(x, np.ones(width) / width, "valid") for x in (curve, curve - first))
        steps = np.arange(width, len(curve) + 1)
        above.plot(steps, smooth, label=name, linewidth=1)
        below.plot(steps, distance, linewidth=1)
    above.set_ylabel("loss")
    below.set_ylabel(f"minus {next(iter(curves))}")
    below.set_xlabel("step")
    above.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="such as batch_size=1")
    parser.add_argument("--what", choices=("precision", "optimizer"), default="precision")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()
    variants = PRECISION if args.what == "precision" else OPTIMIZER
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name, keys in variants.items():
        curves[name] = losses(train(args.config, name, keys, args.keys, args.steps, out))
    first = next(iter(curves.values()))
    last = max(1, args.steps // 10)
    print(
        "| variant | largest distance of a step | mean loss of the last tenth | relative | bytes of state a parameter |"
    )
    print("|---|---|---|---|---|")
    for name, curve in curves.items():
        end, base = curve[-last:].mean(), first[-last:].mean()
        distance = np.abs(curve - first).max()
        state = bytes_a_parameter(args.config, variants[name])
        print(f"| {name} | {distance:.4f} | {end:.4f} | {end / base - 1:+.2%} | {state:.2f} |")
    draw(curves, out / "losses.png")
    print(f"drawn: {out / 'losses.png'}")


if __name__ == "__main__":
    main()
