"""Small runs of stage RL: a model with random weights, prompts, and a reward that differs from sample to sample."""

from pathlib import Path
from typing import Any

from support.tiny_directories import model_directory, write_lines
from support.tiny_sizes import KINDS

REWARD = """
def checksum(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
"""


def rl_workspace(directory: Path, kind: str = "dense", num_prompts: int = 12) -> dict[str, Any]:
    """Writes a model, prompts and a reward into `directory`, and returns the keys of a run of 4 steps: 3 prompts with 4
    completions of up to 6 tokens for every 2 optimizer steps.
    """
    model_directory(directory / "model", **{name: value for name, value in KINDS[kind].items() if name != "vocab_size"})
    write_lines(
        directory / "prompts.jsonl",
        [{"src": [f"{n} + {n * n}" + "?" * (n % 4)], "answer": str(n + n * n)} for n in range(num_prompts)],
    )
    (directory / "reward.py").write_text(REWARD, encoding="utf-8")
    return {
        "stage": "RL",
        "rl_algorithm": "grpo",
        "model_name_or_path": str(directory / "model"),
        "train_dataset_path": str(directory / "prompts.jsonl"),
        "output_dir": str(directory / "out"),
        "reward_funcs": f"{directory / 'reward.py'}:checksum",
        "reward_workers": 1,
        "num_generations": 4,
        "rollout_batch_size": 4,
        "steps_per_generation": 2,
        "max_completion_length": 6,
        "max_seq_len": 64,
        "batch_size": 3,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "compute_type": "fp32",
        "save_steps": 1,
        "disable_tqdm": True,
    }
