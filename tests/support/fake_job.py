"""Jobs whose workers only pretend to train: `python fake_job.py agent|worker JSON`, and how tests start them.

A worker counts steps of 0.05 s and saves each in DIRECTORY/saved; what it does at a given step is in its `acts`:
{"<rank>": ["<what>", step]}, on the first attempt only unless the act begins with "always ".
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from erniekit.cluster import agent
from erniekit.cluster.job import Job, Layout, Limits, Master
from erniekit.utils import heartbeat, stop_signals
from erniekit.utils.errors import UserError

HERE = Path(__file__).resolve()


TOKEN = "a token of tests, long enough"


def start(
    directory: Path, world=2, hosts=1, port=None, node=None, acts=None, steps=40, token=TOKEN, starting=0.0, **limits
) -> subprocess.Popen:
    """An agent with `world / hosts` workers, which need `starting` seconds before they begin; its own process, output
    captured.
    """
    directory.mkdir(exist_ok=True)
    spec = {
        "directory": str(directory),
        "world": world,
        "hosts": hosts,
        "port": port,
        "node": node,
        "acts": acts or {},
        "steps": steps,
        "token": token,
        "starting": starting,
        "limits": {"fault": 4.0, "rendezvous": 20.0, **limits},
    }
    return subprocess.Popen(
        [sys.executable, str(HERE), "agent", json.dumps(spec)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[2]}"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 60) -> tuple[int, str]:
    """Exit code and what it said."""
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def pids(directory: Path, count: int, timeout: float = 60) -> dict[int, int]:
    """The workers' process ids by rank, when all of them have done a step."""
    deadline = time.monotonic() + timeout
    while len(found := list(directory.glob("pid-*"))) < count:
        assert time.monotonic() < deadline, f"only {found} came up"
        time.sleep(0.02)
    return {int(path.name[4:]): int(path.read_text()) for path in found}


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(processes, timeout: float = 10) -> None:
    """All of them end soon."""
    deadline = time.monotonic() + timeout
    while left := [pid for pid in processes if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def _agent(spec: dict) -> int:
    directory, world = Path(spec["directory"]), spec["world"]
    layouts = [Layout(world)] + [Layout(n, (f"shrunk={n}",), f"goes on with {n}") for n in range(world - 1, 0, -1)]
    job = Job(
        command=(sys.executable, str(HERE), "worker", json.dumps(spec)),
        environ=os.environ,
        hosts=spec["hosts"],
        slots=world // spec["hosts"],
        layouts=tuple(layouts),
        limits=Limits(**spec["limits"]),
        logs=directory / "logs",
        token=spec["token"],
        master=Master("127.0.0.1", spec["port"], spec["node"]) if spec["port"] else None,
        config={"steps": str(spec["steps"])},
        again=lambda: ["again"],
    )
    try:
        return agent.run(job)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _worker(spec: dict, words: list[str]) -> int:
    time.sleep(spec["starting"])
    parent, _, beat = os.environ["ERNIEKIT_AGENT"].partition(":")
    heartbeat.start(int(beat), int(parent))
    try:
        stop_signals.listen()
        with stop_signals.deferred():
            return _train(spec, words)
    except stop_signals.Stopped as error:
        return 128 + error.number


def _train(spec: dict, words: list[str]) -> int:
    rank, directory = int(os.environ["PADDLE_TRAINER_ID"]), Path(spec["directory"])
    what, at = spec["acts"].get(str(rank), ("", -1))
    if "again" in words and not what.startswith("always "):
        at = -1
    saved = directory / "saved"
    first = int(saved.read_text()) if "again" in words and saved.exists() else 0
    print(f"words {words} from step {first}", file=sys.stderr, flush=True)
    for step in range(first + 1, spec["steps"] + 1):
        time.sleep(0.05)
        if step == at:
            (directory / f"acts-{rank}").touch()
            _act(what.removeprefix("always "))
        if rank == 0:
            _write(saved, step)
        heartbeat.step(step)
        _write(directory / f"pid-{rank}", os.getpid())
        if stop_signals.requested():
            (directory / f"stopped-{rank}").write_text(str(step))
            break
    return 0


def _write(path: Path, number: int) -> None:
    """Whole or not at all: others read it meanwhile."""
    new = path.with_name(f"new-{path.name}")
    new.write_text(str(number))
    new.replace(path)


def _act(what: str) -> None:
    if what == "raise":
        heartbeat.fail("error: the disk is on fire")
        sys.exit(70)
    if what == "user error":
        heartbeat.fail("error: train_dataset_path: no such file")
        sys.exit(1)
    if what == "peer":  # as the others do when one of them is gone
        heartbeat.waiting("all_reduce")
        heartbeat.fail("error: connection closed by peer")
        sys.exit(70)
    if what == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "loop":
        while True:
            pass
    if what == "wait":
        heartbeat.waiting("all_reduce")
        time.sleep(600)


if __name__ == "__main__":
    role = {
        "agent": lambda: _agent(json.loads(sys.argv[2])),
        "worker": lambda: _worker(json.loads(sys.argv[2]), sys.argv[3:]),
    }
    sys.exit(role[sys.argv[1]]())
