"""`erniekit eval` and `erniekit chat` on pictures, as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.terminal import PATIENCE
from support.vision_directories import vision_workspace

CLI = [sys.executable, "-m", "erniekit"]


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_workspace(tmp_path_factory.mktemp("vl"), weights=True)


def run(command: str, yaml: Path, *keys: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    words = [*CLI, command, str(yaml), "continue_training=true", "max_new_tokens=4", *keys]
    return subprocess.run(
        words,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        cwd=yaml.parent,
        env=dict(os.environ),
    )


def test_eval_answers_questions_about_pictures(yaml: Path):
    done = run("eval", yaml, "predict_with_generate=true", "eval_output=results")
    assert done.returncode == 0, done.stderr
    assert "ANLS of texts about pictures" in done.stdout
    text = (yaml.parent / "results" / "eval_predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["images"] for line in lines] == [[f"pictures/e{number}.png"] for number in range(6)]
    results = json.loads((yaml.parent / "results" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["num_text_answers"] == 6 and results["loss"] > 0


def test_chat_shows_pictures(yaml: Path):
    lines = "<image>pictures/e0.png</image>what?\n/image pictures/e1.png\nand this?\n"
    done = run("chat", yaml, "chat_tools=image_zoom_in_tool", text=lines)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert "[Picture 2: pictures/e1.png, 56 x 28 pixels, 2 tokens]" in done.stderr


def test_chat_names_a_file_that_is_not_there(yaml: Path):
    done = run("chat", yaml, text="<image>none.png</image>what?\n")
    assert done.returncode != 0
    assert "none.png: there is no file" in done.stderr and "Traceback" not in done.stderr
