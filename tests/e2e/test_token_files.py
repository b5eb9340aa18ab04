"""From text to token files to a trained and evaluated model, and on from a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import erniekit
from erniekit.checkpoint.safetensors_read import Reader

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_yaml(workspace):
    """A pretraining file over token files that the command made of two texts."""
    command = [sys.executable, "-m", "erniekit", "tokenize", f"tokenizer={workspace}/moe"]
    for name in ("pt-train", "pt-eval"):
        text = ROOT / "examples" / "data" / f"{name}.jsonl"
        subprocess.run(
            [*command, f"output={workspace / name}", str(text)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
    path = workspace / "pretrain.yaml"
    path.write_text(
        f"""
model_name_or_path: {workspace}/moe
continue_training: false
stage: PT
dataset_type: pretrain
input_dir: "0.4 {workspace}/pt-train 0.6 {workspace}/pt-eval"
split: "90,10"
long_document_min_tokens: 150
long_document_weight: 2
max_seq_len: 64
batch_size: 2
eval_iters: 3
max_steps: 20
save_steps: 12
learning_rate: 1.0e-2
output_dir: {workspace}/out
compute_type: fp32
disable_tqdm: true
"""
    )
    return path


def test_token_files_train_evaluate_and_resume_bit_for_bit(workspace, run_yaml):
    whole = erniekit.train(str(run_yaml), do_eval=True)
    data = whole.summary["data"]
    assert whole.history[-1]["loss"] < whole.history[0]["loss"] and whole.summary["eval_loss"] > 0
    assert (data["rows"], data["tokens"], data["fill_rate"]) == (40, 40 * 64, 1.0)
    assert sum(data["rows_by_source"].values()) == 40 and data["samples"] >= data["long_documents"] > 0
    parts = str(workspace / "parts")
    erniekit.train(str(run_yaml), max_steps=20, output_dir=parts)
    (Path(parts) / "checkpoint-20").rename(workspace / "aside")
    rest = erniekit.train(str(run_yaml), output_dir=parts)
    assert [record["step"] for record in rest.history] == list(range(13, 21))
    assert [record["loss"] for record in rest.history] == [record["loss"] for record in whole.history[12:]]
    assert rest.summary["data"] == data
    ours, theirs = Reader(parts), Reader(str(workspace / "out"))
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in ours.keys())  # noqa: SIM118


def test_the_number_of_steps_follows_from_the_files(workspace, run_yaml):
    summary = erniekit.train(str(run_yaml), max_steps=-1, num_train_epochs=0.25, batch_size=8).summary
    assert summary["steps"] == -(-summary["data"]["rows"] // 8) and 0.24 < summary["data"]["epoch"] <= 0.25
    state = json.loads((workspace / "out" / f"checkpoint-{summary['steps']}" / "trainer_state.json").read_text())
    position = state["data"]["position"]
    assert position["row"] + (position["into"] > 0) == summary["data"]["rows"]


def test_other_files_at_a_resume_are_refused(run_yaml, workspace):
    erniekit.train(str(run_yaml), max_steps=13)
    with pytest.raises(ValueError, match=r"another run (?s:.)*weights of input_dir: \["):
        erniekit.train(str(run_yaml), input_dir=f"{workspace}/pt-train")
