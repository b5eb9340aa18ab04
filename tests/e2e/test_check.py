"""`erniekit check` against what training then does: the state of output_dir, the size of checkpoints, the steps."""

import os
import re

import pytest

import erniekit
from erniekit.cli import check


def findings(workspace, level, *words):
    report = check.inspect([str(workspace / "run.yaml"), *words])
    return "\n".join(
        finding.text for section in report.sections for finding in section.findings if finding.level == level
    )


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_what_it_says_of_a_run_is_what_the_run_does(workspace):
    before = findings(workspace, "ok", "max_steps=-1", "num_train_epochs=2")
    steps = int(re.search(r"training: (\d+) steps; an epoch is \d+ steps: 2 epochs", before)[1])
    result = erniekit.train(str(workspace / "run.yaml"), max_steps=-1, num_train_epochs=2, save_steps=1000)
    assert result.history[-1]["step"] == steps
    checkpoint = workspace / "out" / f"checkpoint-{steps}"
    number, unit = re.search(r"each of ([\d.]+) (kB|MB), and a final model", before).groups()
    foretold = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    weights = checkpoint / "model.safetensors"
    measured = weights.stat().st_size + size_of(checkpoint / "optimizer")
    assert measured == pytest.approx(foretold, rel=0.05)


def test_it_tells_a_run_that_continues_from_one_that_does_not_belong_there(workspace):
    erniekit.train(str(workspace / "run.yaml"), max_steps=2)
    before = sorted(os.listdir(workspace / "out"))
    assert "the run resumes from" in findings(workspace, "ok") and findings(workspace, "error") == ""
    assert "holds another run" in findings(workspace, "error", "max_seq_len=32")
    assert "overwrite_output_dir: the run that is there is removed" in findings(
        workspace, "warning", "overwrite_output_dir=true", "max_seq_len=32"
    )
    assert sorted(os.listdir(workspace / "out")) == before
