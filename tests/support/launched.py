"""Starting `erniekit train` in several processes, and finding them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

VARIABLES = ("PADDLE_NODE_RANK", "SLURM_NODEID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JOB_COMPLETION_INDEX")


def start(workspace: Path, *words: str, network: str = "", **environ: str) -> subprocess.Popen:
    """The command in a process group of its own; two cores are shared, so each worker gets one thread. network: the
    namespace to run it in.
    """
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "erniekit", "train", str(workspace / "run.yaml"), *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", network, *command] if network else command,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "ERNIEKIT_NUM_THREADS": "1", **environ},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Exit code and what it said; whatever it left behind is killed."""
    try:
        _, said = process.communicate(timeout=timeout)
    finally:
        for pid in workers(process).values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
    return process.returncode, said


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of an agent's workers, by rank."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return {}
    found = {}
    for child in children:
        try:
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(entry[18:]) for entry in environ if entry.startswith(b"PADDLE_TRAINER_ID=")]
        found.update({rank: int(child) for rank in ranks})
    return found


def wait_for(path: Path, process: subprocess.Popen, timeout: float = 180) -> None:
    """Until the file is there."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {path.name} after {timeout} s"
        time.sleep(0.02)


def steps_of(directory: Path) -> list[dict]:
    """The training steps in metrics.jsonl."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two_hosts(port: str, node: int) -> dict[str, str]:
    """The environment of one of two hosts, both on the loopback interface."""
    return {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PADDLE_NODE_RANK": str(node)}
