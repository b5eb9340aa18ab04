"""LoRA on a base in few bits through the commands: trained, resumed, evaluated, exported, refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import erniekit
from erniekit import lora
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.cli.main import main
from erniekit.models.weights import export_tensors


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def command(workspace):
    """Runs a command on a trained sparse base, in few bits."""
    yaml, base = str(workspace / "run.yaml"), workspace / "base"
    first = [f"model_name_or_path={workspace}/moe", "max_steps=4", f"output_dir={base}", "save_strategy=no"]
    assert main(["train", yaml, *first]) == 0

    def run(name: str, *overrides: str) -> int:
        given = [f"model_name_or_path={base}", "continue_training=true", "fine_tuning=LoRA", "learning_rate=5e-3"]
        given.append("lr_scheduler_type=constant")
        return main([name, yaml, *given, *overrides])

    return run


def test_the_whole_way(command, workspace, capfd):
    out, asked = workspace / "out", "compute_type=wint4/8"
    assert command("train", asked) == 0
    said = capfd.readouterr().err
    assert ": 10 frozen weights in int4 and int8: " in said and " kB instead of " in said
    weights = [file for file in out.rglob("model*.safetensors") if file.parent.name != "optimizer"]
    assert weights == [], "checkpoints hold the adapter alone"
    for step in (2, 4, 6):
        assert (out / f"checkpoint-{step}" / "adapter_model.safetensors").exists()
    assert command("eval", asked) == 0
    evaluated = json.loads((out / "eval_results.json").read_text())["loss"]
    assert command("eval", "compute_type=fp32") == 0
    # Not the same model, but nearly: rounding moved the base by some hundredths of a nat.
    assert 0 < abs(json.loads((out / "eval_results.json").read_text())["loss"] - evaluated) < 0.05
    assert command("export", asked) == 0
    merged = erniekit.load_model(workspace / "base", adapter=str(out))
    lora.merge(merged)
    exported = Reader(out / "export")
    for name, expected in export_tensors(merged):
        np.testing.assert_allclose(exported.read(name, as_fp32=True), expected, rtol=0, atol=1e-6, err_msg=name)


def test_resumed_is_uninterrupted(command, workspace):
    whole, parts = workspace / "whole", workspace / "parts"
    assert command("train", "compute_type=nf4", f"output_dir={whole}") == 0
    assert command("train", "compute_type=nf4", f"output_dir={parts}", "max_steps=2") == 0
    assert command("train", "compute_type=nf4", f"output_dir={parts}") == 0
    assert losses(parts) == losses(whole)
    a, b = (Reader(directory / "adapter_model.safetensors") for directory in (whole, parts))
    assert all(np.array_equal(a.read(name), b.read(name)) for name in a.keys())  # noqa: SIM118 - a Reader


def test_training_every_weight_is_refused(command, capfd):
    assert command("train", "fine_tuning=Full", "quantization=wint8") != 0
    error = capfd.readouterr().err
    assert "set fine_tuning: LoRA, or compute_type: bf16" in error and "Traceback" not in error
