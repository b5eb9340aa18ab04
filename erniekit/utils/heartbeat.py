"""A worker's signs of life for the agent that started it.

A thread writes one small record a second into memory that it shares with the agent (no file system is needed, and
nothing stays behind): the last finished step, what the process does or waits for, and the line it
is at. A record that no longer comes is a stopped process; one that comes and does not change is a hanging one
(`erniekit.cluster.watch` tells which). A process that no agent started calls the same functions, and nothing happens.
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START, TRAINING = "start", "training"
ASKING = "waiting for the user"  # as long as the user likes
INTERVAL = 1.0  # seconds from one record to the next

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_HEADER = struct.Struct("<II")  # length and checksum of the JSON text that follows
_ERROR_AT = 1 << 16  # where the error's record begins; the other one begins at 0


class _Worker:
    """What the main thread does, told by itself; the beating thread only reads."""

    def __init__(self, memory: int, streams: bool) -> None:
        self.memory, self.streams = memory, streams
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
        with self._lock:
            _write(self.memory, fields, 0)

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


def new_memory() -> int:
    """The file descriptor of memory that an agent and one worker share. It has no name: it goes with the processes."""
    if platform.system() == "Linux":
        return os.memfd_create("erniekit-heartbeat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def start(memory: int, parent: int, streams: bool = False) -> None:
    """Beat into `memory` (a file descriptor) from now on, and die when the process `parent`, the agent, does.

    streams: what this process prints goes to the user's terminal. To be called by the main thread, once.
    """
    global _worker
    _die_with(parent)
    _worker = _Worker(memory, streams)
    _worker.write()
    threading.Thread(target=_beat, args=(_worker, parent), daemon=True, name="heartbeat").start()


def step(number: int) -> None:
    """Optimizer step `number` is done. The first call ends the start, during which much more time is allowed."""
    if _worker is not None:
        _worker.mark(None)
        _worker.step, _worker.phase = number, TRAINING
        _worker.write()  # at once, so that the step is known however soon the process dies


def waiting(what: str | None) -> None:
    """The process begins to wait for others in `what`; None: it computes again. An exception on the way leaves it
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
    _write(_worker.memory, record, _ERROR_AT)
    return _worker.streams


def last_record(memory: int) -> dict[str, Any] | None:
    """What a worker wrote last; None before its first record, or while it is being written."""
    return _read(os.pread(memory, _ERROR_AT, 0))


def last_error(memory: int) -> dict[str, Any] | None:
    """What the worker gave to `fail`, if it did."""
    size = os.fstat(memory).st_size
    return _read(os.pread(memory, size - _ERROR_AT, _ERROR_AT)) if size > _ERROR_AT else None


def _write(memory: int, fields: dict[str, Any], at: int) -> None:
    text = json.dumps(fields).encode()
    os.pwrite(memory, _HEADER.pack(len(text), zlib.crc32(text)) + text, at)


def _read(data: bytes) -> dict[str, Any] | None:
    """The record that `data` begins with, if it is whole: the writer may be in the middle of it."""
    if len(data) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack_from(data)
    text = data[_HEADER.size : _HEADER.size + length]
    if len(text) < length or not length or zlib.crc32(text) != checksum:
        return None
    record: dict[str, Any] = json.loads(text)
    return record


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
