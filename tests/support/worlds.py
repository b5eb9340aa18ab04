"""Worlds of several ranks for tests: processes that start once a session and then run one job after another.

A test takes the fixture `world2` or `world4` (tests/distributed/conftest.py) and calls

    results = world2.run(job, size=8)          # [result of rank 0, result of rank 1]

with a function at the top level of a file under tests/ or of the package:

    def job(size):                              # runs on every rank, backend.init() already done
        mesh = build_mesh(Degrees(tensor=2))    # groups are kept from job to job: cheap
        return comm.all_reduce_(paddle.ones([size]), mesh.tensor_group).numpy()

Arguments and results are pickled: pass numbers, strings, lists and numpy arrays, not tensors. Before each job the seed
of paddle and numpy is 0 on every rank. Math libraries have one thread a rank. A job that takes nothing takes about a
millisecond; the first one waits for the processes, which import Paddle (5 s).

What goes wrong is raised in the test as RankError: the traceback of the rank that failed; after `timeout` seconds (120)
where each rank that has not finished was; messages that the job sent and nobody received. The world is then killed, and
the next job starts a new one. Edited files are read anew only by a new world.
"""

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
START_SECONDS = 120
GRACE_SECONDS = 2  # for the other ranks, once one has failed
_PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """A job failed; the message holds what the ranks said."""


class World:
    """`size` processes, started when they are first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._logs: list[Path] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(self, function: Callable[..., Any], *, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Call function(**kwargs) on every rank; its results, by rank.

        Raises:
            RankError: a rank raised, or did not finish in time.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function.__code__.co_filename, function.__module__, function.__qualname__, kwargs))
        for connection in self._connections:
            connection.send_bytes(job)
        return self._collect(timeout, function.__qualname__)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections):
            process.wait()
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        ports = free_ports(self.size)
        self._logs = [Path(self._directory.name) / f"rank{rank}.log" for rank in range(self.size)]
        for rank, log in enumerate(self._logs):
            here, there = Pipe()
            command = [sys.executable, "-W", "ignore", __file__, str(there.fileno())]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **rank_environment(rank, ports), "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
                    pass_fds=[there.fileno()],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        self._collect(START_SECONDS, "start")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._connections, range(self.size)))
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    error, result = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    error, result = f"the process ended\n{self._tail(rank)}", None
                if error is None:
                    results[rank] = result
                else:
                    failures[rank] = error
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not waiting and not failures:
            return [results[rank] for rank in range(self.size)]
        if not failures:
            failures = self._where(list(waiting.values()), timeout)
        self.stop()
        text = "\n".join(f"rank {rank}: {error}" for rank, error in sorted(failures.items()))
        raise RankError(f"{what} in a world of {self.size}:\n{text}")

    def _where(self, ranks: list[int], timeout: float) -> dict[int, str]:
        """The stacks of ranks that have not finished."""
        for rank in ranks:
            self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        return {rank: f"not done after {timeout:.0f} s\n{self._tail(rank)}" for rank in ranks}

    def _tail(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")[-4000:]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that systems give to outgoing connections: still free in a moment."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("", port)):
            ports += [port] if port not in ports else []
    return ports


def rank_environment(rank: int, ports: list[int]) -> dict[str, str]:
    """What a launcher sets for one of len(ports) ranks on this machine."""
    endpoints = [f"127.0.0.1:{port}" for port in ports]
    return {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(ports)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_NNODES": "1",
        "OMP_NUM_THREADS": "1",
    }


def _serve(connection: Connection) -> None:
    """What a rank does: jobs, until the session ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    from erniekit.utils import runtime

    runtime.prepare()
    import numpy as np
    import paddle

    from erniekit.parallel import backend

    runtime.set_threads(1)
    _answer(connection, lambda: backend.init(START_SECONDS) and None)
    while True:
        try:
            path, module, name, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        paddle.seed(0)
        np.random.seed(0)

        _answer(connection, partial(_run, path, module, name, kwargs))


def _run(path: str, module: str, name: str, kwargs: dict[str, Any]) -> Any:
    from erniekit.parallel import backend, comm

    result = _function(path, module, name)(**kwargs)
    comm.gather_objects(None, backend.world_group())  # fails where a message was not received
    return result


def _answer(connection: Connection, job: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((None, job()))
    except BaseException:
        answer = pickle.dumps((traceback.format_exc(), None))
    connection.send_bytes(answer)


_loaded: dict[str, ModuleType] = {}


def _function(path: str, module: str, name: str) -> Callable[..., Any]:
    """A function by its file under tests/, whatever name pytest imported that under; elsewhere by its module."""
    if not Path(path).is_relative_to(TESTS):
        return getattr(importlib.import_module(module), name)
    if path not in _loaded:
        spec = importlib.util.spec_from_file_location(f"job_{len(_loaded)}_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None
        _loaded[path] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = _loaded[path]
        spec.loader.exec_module(_loaded[path])
    return getattr(_loaded[path], name)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
