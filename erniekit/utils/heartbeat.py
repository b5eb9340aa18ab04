"""A worker's signs of life for the agent that started it.

Once a second, a thread writes a small record into memory shared with the agent (which needs no file system and leaves
nothing behind): the last finished step, what the process does or waits for, and the line of code that it executes. If
records stop, the process is stopped; if they continue without a change, it hangs (`erniekit.cluster.watch` decides
which). In a process without an agent these functions have no effect.
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
ASKING = "waiting for the user"  # this wait has no time limit
INTERVAL = 1.0  # seconds between records

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_HEADER = struct.Struct("<II")  # length and checksum of the JSON text that follows
_ERROR_AT = 1 << 16  # offset of the error record; the heartbeat record is at 0


class _Worker:
    """The state of the main thread. Only the main thread writes it; the heartbeat thread reads it."""

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
        """Note progress: a wait or a step has begun or ended."""
        now = time.monotonic()
        if self.phase == TRAINING:
            self.longest = max(self.longest, now - self.since)
        self.waiting, self.since = waiting, now

    def write(self) -> None:
        """Write the heartbeat record. Times are of the monotonic clock, which all processes of a host share."""
        fields = {
            "time": time.monotonic(),
            "step": self.step,
            "phase": self.phase,
            "waiting": self.waiting,
            "since": self.since,
            "longest": self.longest,
            "at": self._current_line(),
        }
        with self._lock:
            _write(self.memory, fields, 0)

    def _current_line(self) -> str:
        """The line of code that the main thread executes."""
        frame = sys._current_frames().get(self.main)
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        if frame is None:
            return ""
        code = frame.f_code
        return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno} in {code.co_name}"


_worker: _Worker | None = None


def new_memory() -> int:
    """The file descriptor of memory shared by the agent and one worker. It is unnamed and ends with the processes."""
    if platform.system() == "Linux":
        return os.memfd_create("erniekit-heartbeat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def start(memory: int, parent: int, streams: bool = False) -> None:
    """Start the heartbeat into `memory` (a file descriptor), and arrange for this process to die with `parent`, the
    agent.

    streams: whether this process prints to the user's terminal. The main thread calls this once.
    """
    global _worker
    _die_with(parent)
    _worker = _Worker(memory, streams)
    _worker.write()
    threading.Thread(target=_beat, args=(_worker, parent), daemon=True, name="heartbeat").start()


def step(number: int) -> None:
    """Record that optimizer step `number` is finished. The first call ends the start-up, which may take much longer."""
    if _worker is not None:
        _worker.mark(None)
        _worker.step, _worker.phase = number, TRAINING
        _worker.write()  # at once, so that the step is known even if the process dies soon


def waiting(what: str | None) -> None:
    """Record that the process waits for others in `what`; None: it computes again. If an exception ends the wait, the
    record stays, which distinguishes a rank that failed by itself from one that failed because its peer did.
    """
    # Waits of other threads (an asynchronous save) are not limited.
    if _worker is not None and threading.get_ident() == _worker.main:
        _worker.mark(what)


@contextlib.contextmanager
def device_read() -> Iterator[None]:
    """A context for a read of the device. Over NCCL a collective only joins the device's queue, and the host waits for
    it, and so for other ranks, at the next read.
    """
    if _worker is None:
        yield
        return
    waiting("a read of the device")
    try:
        yield
    finally:  # an error of the device is this rank's own
        waiting(None)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A context for work that may take long, and during which others may wait long: an evaluation, a save."""
    if _worker is None:
        yield
        return
    _worker.mark(None)
    before, _worker.phase = _worker.phase, name
    yield
    _worker.since, _worker.phase = time.monotonic(), before


def fail(text: str, by_peer: bool = False) -> bool:
    """Pass the error to the agent, which shows it if it is the first of the job. `by_peer`: another rank met it first,
    as it also did if this one waits for others. Returns True if this process should not print it too, since on the
    terminal it would hide the first error.
    """
    if _worker is None:
        return False
    blamed = by_peer or _worker.waiting is not None
    record = {"time": time.monotonic(), "text": text, "by_peer": blamed, "step": _worker.step}
    _write(_worker.memory, record, _ERROR_AT)
    return _worker.streams


def last_record(memory: int) -> dict[str, Any] | None:
    """A worker's last record; None before its first record, or while one is being written."""
    return _read(os.pread(memory, _ERROR_AT, 0))


def last_error(memory: int) -> dict[str, Any] | None:
    """The error that the worker passed to `fail`; None if it did not."""
    size = os.fstat(memory).st_size
    return _read(os.pread(memory, size - _ERROR_AT, _ERROR_AT)) if size > _ERROR_AT else None


def _write(memory: int, fields: dict[str, Any], at: int) -> None:
    text = json.dumps(fields).encode()
    os.pwrite(memory, _HEADER.pack(len(text), zlib.crc32(text)) + text, at)


def _read(data: bytes) -> dict[str, Any] | None:
    """The record at the beginning of `data`; None if it is incomplete, since the writer may be writing it now."""
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
    os.kill(os.getpid(), signal.SIGKILL)  # for systems whose kernel does not do it


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request
        os.kill(os.getpid(), signal.SIGKILL)
