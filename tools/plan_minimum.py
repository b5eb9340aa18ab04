"""Plans each row of ERNIEKit's table of minimum resources (cards of 80 GB) and prints the table of docs/plan.md:
python tools/plan_minimum.py [WORD ...]  (only rows whose files contain a word)
"""

import sys
from pathlib import Path

from erniekit import config
from erniekit.cli import plan as command
from erniekit.plan import advice
from erniekit.plan.hardware import load_hardware
from erniekit.plan.memory import MemoryPlan, plan_memory
from erniekit.plan.report import gigabytes
from erniekit.training.outline import outline_stage
from erniekit.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
# ERNIEKit's row, our file for it, and its number of cards.
ROWS = (
    ("0.3B SFT 8K", "0.3B/sft/run_sft_8k", 1),
    ("0.3B DPO 8K", "0.3B/dpo/run_dpo_8k", 1),
    ("21B-A3B SFT 8K", "21B-A3B/sft/run_sft_8k", 8),
    ("21B-A3B LoRA, wint8, 8K", "21B-A3B/sft/run_sft_wint8mix_lora_8k", 1),
    ("21B-A3B DPO 8K", "21B-A3B/dpo/run_dpo_8k", 8),
    ("21B-A3B DPO-LoRA, wint8, 8K", "21B-A3B/dpo/run_dpo_wint8mix_lora_8k", 1),
    ("VL-28B-A3B SFT 8K", "VL-28B-A3B/sft/run_sft_8k", 8),
    ("VL-28B-A3B LoRA 8K", "VL-28B-A3B/sft/run_sft_lora_8k", 4),
    ("300B-A47B SFT 8K", "300B-A47B/sft/run_sft_8k", 96),
    ("300B-A47B SFT 32K", "300B-A47B/sft/run_sft_32k", 112),
    ("300B-A47B LoRA, wint, 8K", "300B-A47B/sft/run_sft_wint8mix_lora_8k", 4),
    ("300B-A47B LoRA, wint, 32K", "300B-A47B/sft/run_sft_wint8mix_lora_32k", 4),
    ("300B-A47B LoRA, wint, 128K", "300B-A47B/sft/run_sft_wint8mix_lora_128k", 8),
    ("300B-A47B DPO 8K", "300B-A47B/dpo/run_dpo_8k", 112),
    ("300B-A47B DPO-LoRA 8K", "300B-A47B/dpo/run_dpo_lora_8k", 16),
    ("VL-424B-A47B LoRA 8K", "VL-424B-A47B/sft/run_sft_lora_8k", 16),
    ("VL-424B-A47B LoRA, wint, 8K", "VL-424B-A47B/sft/run_sft_wint8mix_lora_8k", 8),
    ("VL-424B-A47B LoRA, wint, 128K", "VL-424B-A47B/sft/run_sft_wint8mix_lora_128k", 16),
)


def main(words: list[str]) -> None:
    """Print a row for each row of ERNIEKit's table."""
    print("| run | cards | with the file's degrees | else |")
    print("|---|---|---|---|")
    for title, file, gpus in ROWS:
        if not words or any(word in file for word in words):
            print(f"| {title} | {gpus} | {' | '.join(_row(file, gpus))} |", flush=True)


def _row(file: str, gpus: int) -> tuple[str, str]:
    card = load_hardware("H800")
    cfg = config.load(str(CONFIGS / f"ERNIE-4.5-{file}.yaml"), [], "train")
    per_node = min(gpus, 8)
    try:
        job = command.job_of(cfg, command.PlanOptions(gpus=gpus, gpus_per_node=per_node), card)
        plan = plan_memory(job, card.memory_bytes, outline_stage)
        first = _said(plan)
        if plan.fits:
            return first, ""
    except UserError:
        job = command.job_of(cfg, command.PlanOptions(), card)
        first = f"they do not divide {gpus}"
    other = advice.least_cluster(job, card.memory_bytes, outline_stage, gpus)
    if other is not None:
        return first, f"{_layout(other)}: {_said(other)}"
    least = advice.least_cluster(job, card.memory_bytes, outline_stage)
    return first, "no layout" if least is None else f"no; on {least.job.cluster.gpus}: {_layout(least)}"


def _said(plan: MemoryPlan) -> str:
    worst = plan.worst
    left = gigabytes(abs(worst.headroom))
    return f"fits, {left} left" if plan.fits else f"{left} too much; {worst.items[0][0]} {gigabytes(worst.items[0][1])}"


def _layout(plan: MemoryPlan) -> str:
    degrees = plan.job.degrees
    return f"pipeline {degrees.pipeline}, tensor {degrees.tensor}, experts {degrees.expert}, data {degrees.data}"


if __name__ == "__main__":
    main(sys.argv[1:])
