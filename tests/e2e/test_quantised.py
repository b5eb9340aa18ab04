"""Through the commands: train, export quantised, evaluate and train on the quantised directory."""

import json

import pytest

from erniekit.cli.main import main


@pytest.mark.slow
def test_the_whole_way(workspace, capfd):
    """wint8 moves the loss by less than a hundredth of a nat; another evaluation of the same directory gives the same
    number; training from it warns, and what it saves is not quantised.
    """
    yaml, out = str(workspace / "run.yaml"), workspace / "trained"
    run = [yaml, f"model_name_or_path={workspace}/moe", "max_steps=4", f"output_dir={out}", "save_strategy=no"]
    assert main(["train", *run]) == 0
    assert main(["export", *run, "quantization=wint8"]) == 0
    said = capfd.readouterr().err
    assert "wint8: " in said and "tensor-parallel degrees: 1" in said and "read again and equal" in said

    def loss(directory) -> float:
        assert main(["eval", *run, f"checkpoint={directory}"]) == 0
        return json.loads((out / "eval_results.json").read_text())["loss"]

    before, after = loss(out), loss(out / "export")
    assert 0 < abs(after - before) < 0.01 and loss(out / "export") == after
    again = workspace / "again"
    base = [
        yaml,
        f"model_name_or_path={out / 'export'}",
        "continue_training=true",
        f"output_dir={again}",
        "max_steps=1",
    ]
    assert main(["train", *base]) == 0
    assert "training from the checkpoint that was quantised would start from better weights" in capfd.readouterr().err
    assert "quantization_config" not in (again / "config.json").read_text()
    assert main(["export", *run, f"checkpoint={out / 'export'}", f"output_dir={again}", "quantization=wint8"]) != 0
    assert "is quantised already" in capfd.readouterr().err
