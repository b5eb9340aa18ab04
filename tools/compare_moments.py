"""What the storage of AdamW's moments (moment_dtype) does to the loss of one run: a table and a picture.

    python tools/compare_moments.py examples/configs/tiny/sft/run_sft_dense.yaml batch_size=1 max_seq_len=64
    adam_beta2=0.999 --steps 500 --out demo_output/moments

Trains the same model on the same rows once for each storage, from one seed; keys are given to every run. Prints for
each the largest distance of a step's loss from that with fp32 moments, the mean loss of the last tenth of the steps and
its distance in per cent, and the bytes of the optimizer's state for each parameter. Draws losses.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Host memory for the state (offload_optim) changes no bit: tests/unit/training/test_state_home.py.
VARIANTS = {"fp32": "fp32", "bf16": "bf16", "8 bits": "8bit"}


def train(config: str, moment_dtype: str, given: list[str], steps: int, out: Path) -> Path:
    """Train with one storage of the moments, into a directory of its own."""
    target = out / moment_dtype
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
        "moment_dtype": moment_dtype,
    }
    overrides = [f"{key}={value}" for key, value in fixed.items()]
    subprocess.run([sys.executable, "-m", "erniekit", "train", config, *given, *overrides], cwd=ROOT, check=True)
    return target


def losses(directory: Path) -> np.ndarray:
    """The loss of each step."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records if "loss" in record])


def bytes_a_parameter(config: str, moment_dtype: str) -> float:
    """Of the optimizer's state, by formula."""
    from erniekit import config as configuration
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.parallel.memory import state_bytes
    from erniekit.parallel.zero import ShardedParameters

    cfg = configuration.load(config, {"output_dir": "unused"}, "train")
    model = CausalLM(ModelConfig.from_dir(ROOT / str(cfg.model_name_or_path)))
    entries = ShardedParameters.single(model.named_parameters()).entries.values()
    return state_bytes(entries, moment_dtype=moment_dtype) / sum(entry.size for entry in entries)


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
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name, moment_dtype in VARIANTS.items():
        curves[name] = losses(train(args.config, moment_dtype, args.keys, args.steps, out))
    first = next(iter(curves.values()))
    last = max(1, args.steps // 10)
    print(
        "| moments | largest distance of a step | mean loss of the last tenth | relative | bytes of state a parameter |"
    )
    print("|---|---|---|---|---|")
    for name, curve in curves.items():
        end, base = curve[-last:].mean(), first[-last:].mean()
        distance = np.abs(curve - first).max()
        state = bytes_a_parameter(args.config, VARIANTS[name])
        print(f"| {name} | {distance:.4f} | {end:.4f} | {end / base - 1:+.2%} | {state:.2f} |")
    draw(curves, out / "losses.png")
    print(f"drawn: {out / 'losses.png'}")


if __name__ == "__main__":
    main()
