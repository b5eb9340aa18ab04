"""Processes that compute rewards, each of which can be killed when a function hangs.

A worker is a Python child process that communicates over a socket. It imports neither Paddle nor the parent's main
module, what a function prints goes to standard error, and it leads a process group of its own, so that the processes
that a function starts are killed with it.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from erniekit.config.schema_rewards import RewardArgs, reward_names
from erniekit.rewards.sample import Sample
from erniekit.rewards.table import BUILTINS
from erniekit.rewards.user_function import Logged, UserFunction
from erniekit.utils import log, runtime, stop_signals
from erniekit.utils.errors import ConfigError

LARGEST = 1e6  # of a reward's size; one beyond it is taken for an error
_START_SECONDS = 120.0  # for a worker's start, in which the user's file is imported


@dataclass(frozen=True)
class Step:
    """One call of a function: its name, and the places of the samples in their chunk. A built-in function takes one
    sample, the user's all of a prompt.
    """

    name: str
    places: tuple[int, ...]


@dataclass
class Chunk:
    """Samples of one prompt, with their numbers in the whole list, and the calls that are still to be made."""

    samples: list[Sample]
    numbers: list[int]
    steps: deque[Step]


@dataclass(frozen=True)
class Result:
    """The outcome of one call: a value for each sample, None where the function gave none, or a text that says how it
    failed there.
    """

    name: str
    numbers: tuple[int, ...]
    values: list[float | str | None]
    logged: Logged = field(default_factory=Logged)


class _Worker:
    def __init__(self, cfg: RewardArgs, base: Path) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = runtime.python_command(
                "from erniekit.rewards.workers import serve; serve(int(sys.argv[1]), int(sys.argv[2]))",
                str(theirs.fileno()),
                str(os.getpid()),
            )
            with stop_signals.blocked():
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
                )
        self.connection = Connection(ours.detach())
        self.chunk: Chunk | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + _START_SECONDS
        self.send((cfg, base))

    def send(self, message: Any) -> None:
        """Send a message; if the worker has ended, the next receive says so."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def kill(self) -> int:
        """Kill it with all processes that it started, and return its exit code."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.connection.close()
        return self.process.wait()


class Workers:
    """Computes chunks in up to `cfg.reward_workers` processes. The first one is started at once, and its errors (a file
    of the user's that cannot be imported) are raised here as ConfigError.

    fields: for each of the user's functions, the fields of a record that it cannot do without.
    """

    def __init__(self, cfg: RewardArgs, base: Path) -> None:
        self._cfg, self._base = cfg, base
        self._workers: list[_Worker] = []
        self._told: set[str] = set()  # functions that have failed for all completions of a prompt
        self.fields: dict[str, tuple[str, ...]] = {}
        first = self._start()
        if not first.connection.poll(_START_SECONDS):
            self.close()
            raise ConfigError(f"reward_funcs: the functions were not imported within {_START_SECONDS:g} seconds")
        try:
            kind, content = first.connection.recv()
        except (EOFError, OSError):
            code = first.process.wait()
            kind, content = "error", f"the process that imports the functions ended with exit code {code}"
        if kind == "error":
            self.close()
            raise ConfigError(f"reward_funcs: {content}")
        self.fields, first.is_ready = content, True

    def run(self, chunks: Sequence[Chunk], step: int) -> Iterator[Result]:
        """The results of all calls, in the order in which they are done. Close the iterator to stop early."""
        waiting = deque(chunk for chunk in chunks if chunk.steps)
        try:
            while waiting or any(worker.chunk for worker in self._workers):
                while waiting and (free := self._free(len(waiting))):
                    self._give(free, waiting.popleft(), step)
                yield from self._wait(waiting)
        finally:
            for worker in [worker for worker in self._workers if worker.chunk]:
                self._drop(worker)

    def _wait(self, waiting: deque[Chunk]) -> Iterator[Result]:
        """Wait until a worker answers or has taken too long; `waiting` gets what is to be done again."""
        busy = [worker for worker in self._workers if worker.chunk or not worker.is_ready]
        seconds = min(worker.deadline for worker in busy) - time.monotonic()
        ready = wait([worker.connection for worker in busy], max(seconds, 0.0))
        for worker in busy:
            if worker.connection in ready:
                yield from self._receive(worker, waiting)
            elif time.monotonic() > worker.deadline:
                yield from self._lose(worker, self._too_long(worker), waiting)

    def close(self) -> None:
        """Kill all processes."""
        for worker in list(self._workers):
            self._drop(worker)

    def _start(self) -> _Worker:
        self._workers.append(_Worker(self._cfg, self._base))
        return self._workers[-1]

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _free(self, num_waiting: int) -> _Worker | None:
        """A worker that waits for work. Others are started while there is work for them."""
        free = next((worker for worker in self._workers if worker.is_ready and not worker.chunk), None)
        starting = sum(not worker.is_ready for worker in self._workers)
        if free is None and starting < num_waiting and len(self._workers) < self._cfg.reward_workers:
            self._start()
        return free

    def _give(self, worker: _Worker, chunk: Chunk, step: int) -> None:
        worker.chunk = chunk
        worker.send((chunk.samples, list(chunk.steps), step))
        worker.deadline = time.monotonic() + self._allowed(chunk)

    def _allowed(self, chunk: Chunk) -> float:
        """Seconds for the chunk's next call."""
        step = chunk.steps[0]
        builtin = BUILTINS.get(step.name)
        more = builtin.seconds(chunk.samples[step.places[0]], self._cfg) if builtin else 0.0
        return self._cfg.reward_timeout + more

    def _receive(self, worker: _Worker, waiting: deque[Chunk]) -> Iterator[Result]:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._lose(worker, "", waiting)
            return
        if kind == "ready":
            worker.is_ready = True
            return
        if kind == "error":  # it was imported before, in another process
            self._drop(worker)
            raise ConfigError(f"reward_funcs: {content}")
        chunk = worker.chunk
        assert chunk is not None
        values, logged = content
        step = chunk.steps.popleft()
        if chunk.steps:
            worker.deadline = time.monotonic() + self._allowed(chunk)
        else:
            worker.chunk = None
        if isinstance(values, str) and len(step.places) > 1:  # one by one, to know for which completion it fails
            waiting.append(_singly(chunk, step))
            if step.name not in self._told:
                self._told.add(step.name)
                log.warning(
                    f"reward {step.name}: {chunk.samples[0].place}: {values}; where it fails for the completions of a "
                    "prompt, it is called for each of them alone (said once)"
                )
        else:
            values = [values] if isinstance(values, str) else values
            yield Result(step.name, tuple(chunk.numbers[i] for i in step.places), values, logged)

    def _too_long(self, worker: _Worker) -> str:
        if worker.chunk is None:
            return f"its process did not start within {_START_SECONDS:g} seconds"
        return f"it took more than {self._allowed(worker.chunk):g} s (reward_timeout) and was killed"

    def _lose(self, worker: _Worker, why: str, waiting: deque[Chunk]) -> Iterator[Result]:
        """A worker hangs or has ended: the call that it was at has failed, and another worker makes the others."""
        chunk, was_ready = worker.chunk, worker.is_ready
        code = self._drop(worker)
        if not was_ready:
            raise ConfigError(f"reward_funcs: {why or f'a process for rewards ended with exit code {code}'}")
        if chunk is None:
            return  # it ended while it had nothing to do
        step = chunk.steps.popleft()
        if chunk.steps:
            waiting.appendleft(chunk)
        if len(step.places) > 1:
            waiting.append(_singly(chunk, step))
        else:
            text = why or f"its process ended ({_exit_text(code)})"
            yield Result(step.name, (chunk.numbers[step.places[0]],), [text])


def _exit_text(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}  # those of real time have none
    return f"exit code {code}" if code >= 0 else names.get(-code, f"signal {-code}")


def _singly(chunk: Chunk, step: Step) -> Chunk:
    steps = deque(Step(step.name, (place,)) for place in step.places)
    return Chunk(chunk.samples, chunk.numbers, steps)


def serve(descriptor: int, parent: int) -> None:
    """The main function of a worker: reads the settings, then chunks, and answers every call of a chunk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the trainer, which then ends its workers
    runtime.end_with_parent(parent)
    connection = Connection(descriptor)
    sys.stdout = sys.stderr
    try:
        cfg, base = connection.recv()
        try:
            users = _user_functions(cfg, base)
        except BaseException as error:
            connection.send(("error", _failure(error)))
            return
        connection.send(("ready", {name: function.fields for name, function in users.items()}))
        while True:
            samples, steps, number = connection.recv()
            for step in steps:
                values, logged = _call(cfg, users, step, [samples[i] for i in step.places], number)
                connection.send(("values", (values, logged)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent has closed its end


def _user_functions(cfg: RewardArgs, base: Path) -> dict[str, UserFunction]:
    functions = {}
    for written, name in zip(cfg.reward_funcs, reward_names(cfg.reward_funcs), strict=True):
        path, colon, _ = written.rpartition(":")
        if colon:
            functions[name] = UserFunction(base / path, name)
    return functions


def _call(
    cfg: RewardArgs, users: dict[str, UserFunction], step: Step, samples: list[Sample], number: int
) -> tuple[list[float | str | None] | str, Logged]:
    """The checked values of a call, or a text that says how it failed, and what it logged."""
    try:
        if step.name in users:
            values, logged = users[step.name](samples, number)
        else:
            values, logged = [BUILTINS[step.name].function(samples[0], cfg)], Logged()
        return [checked(value) for value in values], logged
    except BaseException as error:  # also SystemExit
        return _failure(error), Logged()


def checked(value: Any) -> float | str | None:
    """The value as a float; a text if it is no finite number of a usual size."""
    if value is None:
        return None
    try:
        number = float("" if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return f"it gave {str(value)[:40]!r} of the type {type(value).__name__}, not a number or None"
    if not math.isfinite(number):
        return f"it gave {number}"
    if abs(number) > LARGEST:
        return f"it gave {number:g}, which is beyond {LARGEST:g}"
    return number


def _failure(error: BaseException) -> str:
    """What was raised, and where in the user's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "erniekit/rewards" not in frame.filename]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # a __str__ of the user's own exception
        text = "its text cannot be shown, since its __str__ raises, too"
    return f"{type(error).__name__}: {text}{place}" if not isinstance(error, ValueError) or place else text
