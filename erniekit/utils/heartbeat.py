"""A worker's signs of life for the agent that started it.

A thread writes one small record a second: the last finished step, what the process does or waits for, and the line it
is at. A record that no longer comes is a stopped process; one that comes and does not change is a hanging one
(`erniekit.cluster.watch` tells which). A process that no agent started calls the same functions, and nothing happens.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

START, TRAINING = "start", "training"
INTERVAL = 1.0  # seconds from one record to the next

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Worker:
    """What the main thread does, told by itself; the beating thread only reads."""

    def __init__(self, path: Path, streams: bool) -> None:
        self.path, self.streams = path, streams
        self.main = threading.get_ident()
        self.step = 0
        self.phase = START
        self.waiting: str | None = None
        self.since = time.monotonic()
        self.longest = 0.0
        self._lock = threading.Lock()

    def mark(self, waiting: str | None) -> None:
        """Something has moved."""
        now = time.monotonic()
        if self.phase == TRAINING:
            self.longest = max(self.longest, now - self.since)
        self.waiting, self.since = waiting, now

    def write(self) -> None:
        """Leave a record. Times are of the monotonic clock, which all processes of a host share."""
        fields = {
            "time": time.monotonic(),
            "step": self.step,
            "phase": self.phase,
            "waiting": self.waiting,
            "since": self.since,
            "longest": self.longest,
            "at": self._place(),
        }
        with self._lock, contextlib.suppress(FileNotFoundError):  # no directory: the agent has cleared up, it ends
            _write(self.path, json.dumps(fields))

    def _place(self) -> str:
        """The line that the main thread is at."""
        frame = sys._current_frames().get(self.main)
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        if frame is None:
            return ""
        code = frame.f_code
        return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno} in {code.co_name}"


_worker: _Worker | None = None


def start(path: Path, parent: int, streams: bool = False) -> None:
    """Beat into the file `path` from now on, and die when the process `parent`, the agent, does.

    streams: what this process prints goes to the user's terminal. To be called by the main thread, once.
    """
    global _worker
    _die_with(parent)
    _worker = _Worker(path, streams)
    _worker.write()
    threading.Thread(target=_beat, args=(_worker, parent), daemon=True, name="heartbeat").start()


def step(number: int) -> None:
    """Optimizer step `number` is done. The first call ends the start, during which much more time is allowed."""
    if _worker is not None:
        _worker.mark(None)
        _worker.step, _worker.phase = number, TRAINING
        _worker.write()  # at once, so that the step is known however soon the process dies


def waiting(what: str | None) -> None:
    """The process begins to wait for others in `what`; None: it goes on by itself. An exception on the way leaves it
    waiting, which tells a rank that failed from those that failed because it did.
    """
    # Other threads (an asynchronous save) may wait as long as they like.
    if _worker is not None and threading.get_ident() == _worker.main:
        _worker.mark(what)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Work that may take long and in which others may wait long: an evaluation, a save."""
    if _worker is None:
        yield
        return
    _worker.mark(None)
    before, _worker.phase = _worker.phase, name
    yield
    _worker.since, _worker.phase = time.monotonic(), before


def fail(text: str) -> bool:
    """Hand the error to the agent, which shows it if it is the job's first. True if it should not be printed as well:
    on the terminal it would hide the first.
    """
    if _worker is None:
        return False
    record = {"time": time.monotonic(), "text": text, "by_peer": _worker.waiting is not None, "step": _worker.step}
    _write(error_file(_worker.path), json.dumps(record))
    return _worker.streams


def error_file(path: Path) -> Path:
    """Where `fail` writes for the worker that beats into `path`."""
    return path.with_suffix(".error")


def _write(path: Path, text: str) -> None:
    """A reader sees the old record or the new one, never half of one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _beat(worker: _Worker, parent: int) -> None:
    while os.getppid() == parent:
        worker.write()
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGKILL)  # where the kernel cannot do it


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
