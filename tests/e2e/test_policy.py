"""A run of stage RL that is killed while it generates, scores or saves resumes to the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import launched
from support.rl_runs import rl_workspace

from erniekit.checkpoint.safetensors_read import Reader

pytestmark = pytest.mark.slow

# Says where a run is: the file is touched before each moment.
MARKS = """
import sys, time
from pathlib import Path
from erniekit.cli import main
from erniekit.checkpoint.manager import CheckpointManager
from erniekit.training.rl import loader
from erniekit.training.rl.generate import Generator

where = Path(sys.argv.pop(1))

def slowly(name, function, number):
    count = 0
    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            (where / name).touch()
            time.sleep(2)
        return function(*args, **kwargs)
    return call

Generator._run = slowly("generating", Generator._run, 2)
loader.score_groups = slowly("scoring", loader.score_groups, 2)
CheckpointManager.save = slowly("saving", CheckpointManager.save, 2)
sys.exit(main.main(sys.argv[1:]))
"""


def command(keys: dict, **changes: object) -> list[str]:
    return ["train", *(f"{name}={value}" for name, value in (keys | changes).items())]


def result(directory: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The weights of the final model, and the completions of the whole run."""
    reader = Reader(directory)
    weights = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    lines = (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return weights, [json.loads(line)["completion"] for line in lines]


def test_a_killed_run_repeats_its_last_rollout(tmp_path):
    keys = rl_workspace(tmp_path) | {"dynamic_sample": True, "rollout_correction": "icepop", "kl_coef": 0.1}
    environment = {**os.environ, "ERNIEKIT_NUM_THREADS": "1"}
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, "-m", "erniekit", *command(keys, output_dir=whole)], env=environment, check=True)
    wanted, completions = result(whole)
    (tmp_path / "marks.py").write_text(MARKS)
    for moment in ("generating", "scoring", "saving"):
        out, marks = tmp_path / f"out_{moment}", tmp_path / f"marks_{moment}"
        marks.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "marks.py"), str(marks), *command(keys, output_dir=out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        launched.wait_for(marks / moment, process)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run([sys.executable, "-m", "erniekit", *command(keys, output_dir=out)], env=environment, check=True)
        found, again = result(out)
        assert again == completions, moment
        assert all((wanted[name] == found[name]).all() for name in wanted), moment
