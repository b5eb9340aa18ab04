"""Rollouts with pictures and with tools: the training computation sees what the generating one saw, token for token.

The log-probabilities that generating reported (one token at a time, from the cache) are compared with those of the
training pass over the whole batch: a wrong position, picture, mask or input of any token would show in them.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.pictures import write_picture
from support.rl_runs import rl_workspace
from support.tiny_directories import write_lines
from support.vision_directories import vision_model_directory

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.generation.tool_calls import Answer
from erniekit.training.rl import generate, tools
from erniekit.training.run import train

CLOSE = 2e-4  # fp32, a cached step against a whole pass


def run(keys: dict, **changes: object) -> tuple[list[dict], list[dict]]:
    """(steps of metrics.jsonl, lines of samples.jsonl)."""
    out = train(config.load(None, keys | changes, "train")).output_dir
    steps, lines = ([json.loads(x) for x in (out / name).read_text().splitlines()]
                    for name in ("metrics.jsonl", "samples.jsonl"))  # fmt: skip
    return [step for step in steps if "loss" in step], lines


@pytest.fixture
def pictures(tmp_path: Path) -> dict:
    """Keys of a run on prompts with one picture, two pictures and none."""
    keys = rl_workspace(tmp_path)
    vision_model_directory(tmp_path / "vl", weights=True)
    records = []
    for number in range(6):
        names = [f"p{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(names):
            write_picture(tmp_path / name, 28 * (1 + number % 2), 28 * (1 + i), seed=number)
        records.append({"prompt": "<image>" * len(names) + f"{number}?", "images": names, "answer": "1"})
    write_lines(tmp_path / "vl.jsonl", records)
    return keys | {
        "stage": "VL-RL",
        "model_name_or_path": str(tmp_path / "vl"),
        "train_dataset_path": str(tmp_path / "vl.jsonl"),
        "train_dataset_type": "messages",
        "max_seq_len": 200,
        "rollout_correction": "icepop",
        "num_generations": 2,
        "max_steps": 2,
        "save_strategy": "no",
    }


@pytest.fixture
def always_calls(monkeypatch: pytest.MonkeyPatch):
    """Makes every turn end soon, and taken for a call of a tool."""

    def set_call(call: dict) -> None:
        monkeypatch.setattr(tools, "read_calls", lambda text: Answer(text, [call], 0))
        begin = generate.Generator.__init__

        def with_many_ends(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self._limits = replace(self._limits, stop_ids=(2, *range(20, 1200)))

        monkeypatch.setattr(generate.Generator, "__init__", with_many_ends)

    return set_call


def test_pictures_are_the_same_in_generating_and_training(pictures):
    steps, lines = run(pictures)
    assert len(steps) == 2 and all(step["rollout/logp_difference/max"] < CLOSE for step in steps)
    assert {len(line["prompt"][0]["content"]) for line in lines} == {2, 3}  # one picture and text, or two
    small, _ = run(pictures, batch_size=16, output_dir=pictures["output_dir"] + "2")
    assert small[0]["loss"] == pytest.approx(steps[0]["loss"], abs=1e-5)
    assert small[0]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-3)


def test_a_run_on_pictures_resumes_between_the_steps_of_a_rollout_to_the_bit(pictures):
    """Pictures are not in the checkpoint: they are decoded again."""
    keys = pictures | {"save_strategy": "steps", "save_steps": 1}
    whole, _ = run(keys)
    wanted = weights(keys["output_dir"])
    steps, _ = run(keys, resume_from_checkpoint=f"{keys['output_dir']}/checkpoint-1")
    assert [step["loss"] for step in steps] == [step["loss"] for step in whole]
    assert [step["grad_norm"] for step in steps] == [step["grad_norm"] for step in whole]
    assert weights(keys["output_dir"]) == wanted


def weights(directory: str) -> dict[str, bytes]:
    reader = Reader(Path(directory))
    return {name: reader.read(name).tobytes() for name in reader.keys()}  # noqa: SIM118 no mapping


def test_turns_and_results_are_the_same_in_generating_and_training(tmp_path, always_calls):
    always_calls({"name": "calculator", "arguments": {"expression": "6*7"}})
    keys = rl_workspace(tmp_path) | {
        "max_steps": 2,
        "save_strategy": "no",
        "rollout_correction": "icepop",
        "num_generations": 2,
    }
    changes = {"tools": "calculator", "max_turns": 3, "max_completion_length": 90, "max_seq_len": 400}
    steps, lines = run(keys, **changes)
    assert all(step["rollout/logp_difference/max"] < CLOSE for step in steps)
    roles = {tuple(turn["role"] for turn in line["turns"]) for line in lines}
    assert ("assistant", "tool", "assistant", "tool", "assistant") in roles
    assert all(turn["content"] == "42" for line in lines for turn in line["turns"] if turn["role"] == "tool")
    assert sum(step["num_supervised"] for step in steps) == sum(line["length"] for line in lines)


@pytest.mark.slow
def test_a_zoomed_picture_is_the_same_in_generating_and_training(pictures, always_calls):
    always_calls({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 100, 700, 800]}})
    changes = {"tools": "image_zoom_in_tool", "max_turns": 3, "max_completion_length": 120, "max_seq_len": 3000}
    steps, _ = run(
        pictures, **changes, steps_per_generation=1, rollout_batch_size=2, chat_template="vl_thinking", max_steps=1
    )
    assert all(step["rollout/logp_difference/max"] < CLOSE for step in steps)
    assert steps[0]["num_tokens"] > steps[0]["num_supervised"] * 2
