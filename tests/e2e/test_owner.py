"""Two jobs in one output_dir, and kills while one takes the place of another: with real processes."""

import json
import os
import shutil
import signal

import pytest
from support import launched

pytestmark = pytest.mark.slow


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("degree", [1, 2])
def test_a_second_job_is_refused_and_the_first_one_is_not_disturbed(workspace, degree):
    words = ("max_steps=100000", "save_steps=100000", f"data_parallel_degree={degree}")
    first = launched.start(workspace, *words)
    out = workspace / "out"
    launched.wait_for(out / "metrics.jsonl", first)
    os.killpg(first.pid, signal.SIGSTOP)  # so that its files do not change by themselves
    stopped = launched.workers(first).values()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    before = files(out)
    code, said = launched.finish(launched.start(workspace, "max_steps=3", f"data_parallel_degree={degree}"))
    assert code == 1 and "is in use by process" in said
    assert files(out) == before
    for pid in (*stopped, first.pid):
        os.kill(pid, signal.SIGKILL)
    launched.finish(first)
    code, said = launched.finish(launched.start(workspace, "max_steps=3"))
    assert code == 0, said


def test_a_job_whose_directory_vanishes_ends(workspace):
    """Two ranks: none of them may wait for the other's part of a checkpoint."""
    process = launched.start(workspace, "max_steps=100000", "data_parallel_degree=2")
    launched.wait_for(workspace / "out" / "checkpoint-2", process)
    (workspace / "out").rename(workspace / "moved")
    code, said = launched.finish(process, timeout=60)
    assert code == 1 and "was removed or renamed during the run" in said, said
    shutil.rmtree(workspace / "moved")


def test_a_restarted_job_goes_on_in_the_branch_that_it_began(workspace):
    """It went back to an older checkpoint, and a rank was killed since."""
    words = ("data_parallel_degree=2", "save_steps=1")
    assert launched.finish(launched.start(workspace, *words, "max_steps=8"))[0] == 0
    out = workspace / "out"
    source = f"resume_from_checkpoint={out}/checkpoint-2"
    process = launched.start(workspace, *words, source, "max_steps=30", "max_restarts=1")
    launched.wait_for(out / "abandoned-1" / "checkpoint-3", process)
    launched.wait_for(out / "checkpoint-4", process)
    os.kill(launched.workers(process)[1], signal.SIGKILL)
    code, said = launched.finish(process)
    assert code == 0, said
    assert sorted(path.name for path in (out / "abandoned-1").iterdir())[:6] == [f"checkpoint-{n}" for n in range(3, 9)]
    assert not (out / "abandoned-2").exists()
    assert [record["step"] for record in launched.steps_of(out)] == list(range(1, 31))
    assert json.loads((out / "run.json").read_text())["final_model"]["step"] == 30
