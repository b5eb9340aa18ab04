"""Reinforcement learning on pictures: a model that was fine-tuned on two notations of an answer learns the one that is
rewarded, on pictures that it has not seen.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_directories import write_lines
from support.vision_directories import vision_model_directory

from erniekit import config
from erniekit.training.run import train

pytestmark = pytest.mark.slow
COLOURS = {"red": ("红", (214, 40, 40)), "green": ("绿", (40, 150, 60)), "blue": ("蓝", (40, 80, 210))}


def draw(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> None:
    """A square of a colour somewhere on grey paper, 56 x 56 pixels."""
    pixels = np.full((56, 56, 3), rng.integers(200, 256), np.uint8)
    left, top = rng.integers(0, 28, 2)
    pixels[top : top + 28, left : left + 28] = colour
    Image.fromarray(pixels).save(path)


def write_data(directory: Path) -> None:
    """sft.jsonl: three of five answers are Chinese words. rl.jsonl and test.jsonl: the English word is right."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"sft": [], "rl": [], "test": []}
    for name, count in (("sft", 60), ("rl", 24), ("test", 12)):
        for number in range(count):
            english, (chinese, colour) = list(COLOURS.items())[number % 3]
            file = f"{name}-{number}.png"
            draw(directory / file, colour, rng)
            question = {"role": "user", "content": "<image>colour?"}
            answer = {"role": "assistant", "content": chinese if number // 3 % 5 < 3 else english}
            row = {"messages": [question, answer]} if name == "sft" else {"prompt": [question], "answer": english}
            rows[name].append(row | {"images": [file]})
    for name, lines in rows.items():
        write_lines(directory / f"{name}.jsonl", lines)


def run(keys: dict) -> list[dict]:
    out = train(config.load(None, keys, "train")).output_dir
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_rewarded_notation_is_learnt(tmp_path):
    vision_model_directory(tmp_path / "model", weights=True)
    write_data(tmp_path)
    common = {
        "train_dataset_type": "messages",
        "max_seq_len": 64,
        "compute_type": "fp32",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        "chat_template": "vl",
    }
    fine_tuning = {
        "stage": "VL-SFT",
        "model_name_or_path": str(tmp_path / "model"),
        "train_dataset_path": str(tmp_path / "sft.jsonl"),
        "output_dir": str(tmp_path / "sft"),
        "batch_size": 20,
        "max_steps": 120,
        "learning_rate": 3e-3,
        "packing": True,
    }
    run(common | fine_tuning)
    learning = {
        "stage": "VL-RL",
        "rl_algorithm": "gspo",
        "epsilon": 3e-3,
        "epsilon_high": 4e-3,
        "rollout_correction": "icepop",
        "dynamic_sample": True,
        "model_name_or_path": str(tmp_path / "sft"),
        "train_dataset_path": str(tmp_path / "rl.jsonl"),
        "eval_dataset_path": str(tmp_path / "test.jsonl"),
        "eval_dataset_type": "messages",
        "output_dir": str(tmp_path / "rl"),
        "reward_funcs": "exact",
        "difficulty_metric": "exact",
        "num_generations": 8,
        "rollout_batch_size": 8,
        "max_completion_length": 6,
        "batch_size": 64,
        "max_steps": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "lr_scheduler_type": "constant_with_warmup",
        "evaluation_strategy": "steps",
        "eval_steps": 8,
    }
    records = run(common | learning)
    sampled = [record["accuracy"] for record in records if "accuracy" in record]
    held_out = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
    print("accuracy of samples", sampled, "greedy on held-out pictures", held_out)
    assert sampled[0] < 0.7 and held_out[-1] >= 0.9
