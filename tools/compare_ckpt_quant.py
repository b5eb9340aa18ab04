"""What coded moments in a checkpoint (ckpt_quant_stage) do to the losses of a run that is resumed from it.

    python tools/compare_ckpt_quant.py examples/configs/tiny/sft/run_sft_moe.yaml batch_size=1 max_seq_len=64
    --steps 200 --out demo_output/ckpt_quant

Trains one run to its end for each storage, with a checkpoint in the middle, and once more from that checkpoint; keys
are given to every run. Prints for each the bytes of the optimizer's state in the checkpoint, and how far the losses
after the checkpoint are from those of the run that was not interrupted. "none": the optimizer's state is lost.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from comparison import ROOT, losses

VARIANTS = {"fp32": ["O0"], "8 bits": ["O1"], "4 bits": ["O2"], "none": ["O0", "ignore_load_lr_and_optim=true"]}


def train(config: str, out: Path, stage: str, given: list[str], steps: int, *more: str) -> np.ndarray:
    """Train, with a checkpoint in the middle; the loss of each step."""
    fixed = {
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": steps // 2,
        "evaluation_strategy": "no",
        "do_eval": False,
        "disable_tqdm": True,
        "logging_steps": 100,
        "output_dir": out,
        "ckpt_quant_stage": stage,
    }
    overrides = [*given, *(f"{key}={value}" for key, value in fixed.items()), *more]
    subprocess.run([sys.executable, "-m", "erniekit", "train", config, *overrides], cwd=ROOT, check=True)
    return losses(out)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("keys", nargs="*", help="such as batch_size=1")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()
    middle, rows = args.steps // 2, []
    for name, (stage, *more) in VARIANTS.items():
        out = args.out.resolve() / name.replace(" ", "-")
        whole = train(args.config, out, stage, args.keys, args.steps, "overwrite_output_dir=true")
        checkpoint = out / f"checkpoint-{middle}"
        size = sum(path.stat().st_size for path in (checkpoint / "optimizer").iterdir())
        resumed = train(args.config, out, stage, args.keys, args.steps, f"resume_from_checkpoint={checkpoint}", *more)
        distance = np.abs(resumed - whole)[middle:]
        first, last = distance[: max(1, middle // 10)].max(), resumed[-max(1, middle // 10) :].mean()
        change = last / whole[-max(1, middle // 10) :].mean() - 1
        rows.append(
            f"| {name} | {size / 2**20:.2f} | {first:.5f} | {distance.max():.5f} | {last:.4f} | {change:+.2%} |"
        )
    titles = (
        "moments",
        "MiB",
        "largest distance, first tenth",
        "of all steps",
        "mean loss of the last tenth",
        "relative",
    )
    print("\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows]))


if __name__ == "__main__":
    main()
