"""Ctrl-C and its like at every moment of a run, closed streams, full scratch directories, odd working directories."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import fake_job, launched

pytestmark = pytest.mark.slow
TWO = "data_parallel_degree=2"
LONG = ("max_steps=100000", "save_steps=100000")


def start(workspace: Path, *words: str, **keys) -> subprocess.Popen:
    return launched.start(workspace, *words, **keys)


def assert_interrupted(code: int, said: str, expected: int = 130) -> None:
    assert code == expected, said
    assert "Traceback" not in said and "bug in erniekit" not in said, said


@pytest.mark.parametrize(("degree", "model"), [(1, "moe"), (2, "dense")])
def test_ctrl_c_saves_and_the_same_command_goes_on(workspace, degree, model):
    words = ("save_steps=1000", f"data_parallel_degree={degree}", f"model_name_or_path={workspace}/{model}")
    process = start(workspace, "max_steps=100000", *words)
    launched.wait_for(workspace / "out" / "metrics.jsonl", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, said = launched.finish(process)
    assert_interrupted(code, said)
    (saved,) = (workspace / "out").glob("checkpoint-*")
    step = int(saved.name[11:])
    assert f"interrupted by Ctrl-C after step {step}; the newest checkpoint is {saved}" in said.splitlines()[-1]
    code, said = launched.finish(start(workspace, f"max_steps={step + 2}", *words))
    assert code == 0 and f"resuming after step {step}" in said, said


@pytest.mark.parametrize("degree", [1, 2])
def test_ctrl_c_and_sigterm_before_the_first_step(workspace, degree):
    """At several moments of the start: reading the configuration, importing Paddle, building the model."""
    for number, delay in ((signal.SIGINT, 1.0), (signal.SIGINT, 2.5), (signal.SIGTERM, 2.0)):
        shutil.rmtree(workspace / "out", ignore_errors=True)
        process = start(workspace, *LONG, f"data_parallel_degree={degree}", "max_seq_len=32")
        time.sleep(delay)
        process.send_signal(number)
        code, said = launched.finish(process)
        if (workspace / "out" / "metrics.jsonl").exists():  # it was quick: then it has saved
            assert "after step" in said
        elif code == -number:  # Python itself was starting
            assert said == ""
        else:
            assert_interrupted(code, said, 128 + number)
            assert "interrupted" in said or "stopped by SIGTERM" in said


@pytest.mark.parametrize(
    ("words", "saved"),
    [
        (["train", "run.yaml", *LONG], "; no checkpoint has been saved"),
        (["export", "model_name_or_path=dense", "output_dir=out"], ""),
    ],
    ids=["train", "export"],
)
def test_sigterm_while_paddle_is_imported(workspace, words, saved):
    """Paddle has a handler of its own for it, which prints a native stack trace."""
    code = """
import os, signal, sys, threading, time
def send():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while "paddle.nn" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send, daemon=True).start()
from erniekit.cli.main import main
sys.exit(main())
"""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=120, cwd=workspace)
    assert_interrupted(done.returncode, done.stderr, 128 + signal.SIGTERM)
    assert done.stderr.splitlines()[-1] == f"stopped by SIGTERM{saved}"


@pytest.mark.parametrize("delay", [1.0, 3.0])
def test_ctrl_c_ends_an_evaluation_in_one_line(workspace, delay):
    words = ["stage=SFT", "eval_dataset_type=erniekit", f"eval_dataset_path={workspace}/train.jsonl"]
    words += [f"model_name_or_path={workspace}/dense", "continue_training=false", f"output_dir={workspace}/scores"]
    command = [str(Path(sys.executable).with_name("erniekit")), "eval", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode in (130, -signal.SIGINT):
        own = [line for line in said.splitlines() if not line.startswith("[erniekit]")]
        assert own == ["interrupted"] * (process.returncode == 130), said
    assert "Traceback" not in said, said


@pytest.mark.parametrize("degree", [1, 2])
def test_a_second_ctrl_c_in_a_long_step(workspace, degree):
    process = start(workspace, *LONG, f"data_parallel_degree={degree}", "gradient_accumulation_steps=4096")
    assert process.stderr is not None
    for line in process.stderr:
        if "training begins" in line:
            break
    time.sleep(1.0)
    ranks = launched.workers(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, said = launched.finish(process)
    assert time.monotonic() - began < 10
    assert_interrupted(code, said)
    assert said.rstrip().endswith("interrupted; no checkpoint has been saved")
    fake_job.assert_gone(ranks.values())


def test_the_terminal_is_left_as_it_was(workspace):
    """Two ranks with a progress bar, Ctrl-C typed twice: the cursor is back, the last words have their own line."""
    command = [sys.executable, "-m", "erniekit", "train", str(workspace / "run.yaml"), TWO, *LONG]
    command += ["disable_tqdm=false", "gradient_accumulation_steps=512"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "ERNIEKIT_NUM_THREADS": "1"})
    said, typed = b"", 0
    try:
        while True:
            said += os.read(terminal, 65536)
            if typed == 0 and b"\x1b[?25l" in said:
                os.write(terminal, b"\x03")
                typed = time.monotonic()
            elif typed > 0 and b"Ctrl-C again" in said and time.monotonic() - typed > 0.6:
                os.write(terminal, b"\x03")
                typed = -1
    except OSError:  # the end
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = said.decode()
    assert_interrupted(code, text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert re.search(r"\n(interrupted|\[erniekit\] interrupted)[^\n]*\r\n$", text), text[-300:]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_no_rank_outlives_its_agent(workspace, number):
    process = start(workspace, TWO, *LONG, "dataloader_num_workers=1")
    launched.wait_for(workspace / "out" / "metrics.jsonl", process)
    ranks = launched.workers(process)
    children = [pid for rank in ranks.values() for pid in children_of(rank)]
    process.send_signal(number)
    code, said = launched.finish(process)
    assert len(ranks) == 2
    fake_job.assert_gone([*ranks.values(), *children])
    if number == signal.SIGHUP:
        assert code == 0 and "stopped by SIGHUP after step" in said


def children_of(pid: int) -> list[int]:
    """Its child processes, of all its threads."""
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.parametrize(
    ("degree", "closed"), [(1, ">&- 2>/dev/full"), (2, "<&- >&- 2>&-"), (1, "2>&1 | head -1"), (2, "2>&1 | head -1")]
)
def test_closed_streams_end_no_run(workspace, closed, degree):
    command = f"{sys.executable} -m erniekit train {workspace}/run.yaml data_parallel_degree={degree} {closed}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout and "Exception ignored" not in done.stderr
    assert (workspace / "out" / "model.safetensors").exists()


def test_no_scratch_directory_is_needed(workspace):
    code, said = launched.finish(start(workspace, TWO, TMPDIR=str(workspace / "not-there")))
    assert code == 0 and "Traceback" not in said, said


@pytest.mark.parametrize("module", [True, False])
def test_the_working_directory_is_not_imported_from(workspace, monkeypatch, module):
    """Neither by the agent, nor by ranks, nor by data workers."""
    odd = workspace / "odd"
    odd.mkdir()
    for name in ("json", "yaml", "numpy", "struct", "selectors", "data", "heartbeat"):
        (odd / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')\n")
    if not module:
        (odd / "erniekit").mkdir()
        (odd / "erniekit" / "__init__.py").write_text("raise SystemExit('erniekit of the working directory')\n")
    command = [sys.executable, "-m", "erniekit"] if module else [str(Path(sys.executable).with_name("erniekit"))]
    words = ["train", str(workspace / "run.yaml"), TWO, "dataloader_num_workers=1"]
    done = subprocess.run([*command, *words], cwd=odd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "of the working directory" not in done.stderr


def test_a_removed_output_dir_is_no_reason_for_a_traceback(workspace):
    """Not of the agent either, which reads the ranks' logs there."""
    process = start(workspace, TWO, "max_steps=40", "save_steps=1000")
    launched.wait_for(workspace / "out" / "metrics.jsonl", process)
    shutil.rmtree(workspace / "out")
    os.kill(launched.workers(process)[1], signal.SIGKILL)
    code, said = launched.finish(process)
    assert code == 1 and "Traceback" not in said, said
    assert said.rstrip().endswith("error: rank 1 was killed by SIGKILL (the system does that when memory runs out)")


def test_two_hosts_on_loopback_need_no_token_of_the_users(workspace):
    port = launched.free_port()
    keys = {"XDG_CACHE_HOME": str(workspace / "cache")}
    hosts = [start(workspace, TWO, **keys, **launched.two_hosts(port, node)) for node in range(2)]
    assert [launched.finish(host)[0] for host in hosts] == [0, 0]
    assert (workspace / "cache" / "erniekit" / "job-token").exists()


def test_several_hosts_need_a_token(workspace):
    code, said = launched.finish(start(workspace, TWO, NNODES="2", MASTER_ADDR="192.0.2.1"))
    assert code == 1 and "\nerror: ERNIEKIT_JOB_TOKEN is not set" in "\n" + said, said


def test_nproc_per_node_is_named(workspace):
    code, said = launched.finish(start(workspace, "max_steps=1", NPROC_PER_NODE="4"))
    assert code == 0 and said.count("NPROC_PER_NODE") == 1
