"""Ctrl-C (SIGINT), SIGTERM (a scheduler wants the machine back) and SIGHUP (the terminal is gone) as wishes.

While `deferred` lasts they are only noted: the trainer ends the step it is in, saves and stops. At other times
`Stopped` is raised, or while modules are imported the process ends at once. A second Ctrl-C ends it at once, wherever
it is.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from erniekit.utils import heartbeat

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_INTERRUPTED = 128 + signal.SIGINT
_SHOW_CURSOR = "\x1b[?25h"
_BEGIN_LINE = "\r\x1b[K"
# `timeout -s INT` and some shells send a signal twice, to the process and to its group: that is one Ctrl-C.
TWICE = 0.3


class Stopped(KeyboardInterrupt):
    """A signal has come while nothing could be saved. `number`: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_asked: signal.Signals | None = None  # the first signal that came
_asked_at = 0.0
_raised: Stopped | None = None
_deferring = False
_what_is_left: Callable[[], str] = str  # says what has been saved, for the message of an end at once


def listen(what_is_left: Callable[[], str] | None = None, signals: Iterable[signal.Signals] = SIGNALS) -> None:
    """From now on the `signals` are met as above. Does nothing where a signal cannot be caught (not the main thread),
    is ignored (nohup), or where Python code of somebody else catches it. Importing Paddle puts handlers of its own in
    the place of ours: call this again after it.

    what_is_left: says in a few words what a process that ends now leaves behind.
    """
    global _what_is_left
    _what_is_left = what_is_left or _what_is_left
    if threading.current_thread() is not threading.main_thread():
        return
    for number in signals:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _note):
            signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # an agent starts its workers with the signals blocked


@contextlib.contextmanager
def sigterm_waits() -> Iterator[None]:
    """Around the import of Paddle and the call of `listen` after it: in between, Paddle's own handler would end the
    process with a native stack trace. Threads that the import starts keep SIGTERM blocked, so the main one gets it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def asked() -> signal.Signals | None:
    """The signal that came first. Ranks may get it at different steps: they have to agree on one."""
    return _asked


def raised() -> Stopped | None:
    """What was raised because of a signal; native code between us and the caller may have made another exception of
    it.
    """
    return _raised


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Work at whose steps the caller looks at `asked`."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def interrupted(number: int) -> str:
    """The one line about an end at once."""
    left = _what_is_left()
    return f"{'interrupted' if number == signal.SIGINT else f'stopped by {signal.Signals(number).name}'}" + (
        f"; {left}" if left else ""
    )


def restore_terminal() -> None:
    """Show the cursor again, and begin a new line: a progress bar that was killed has hidden the one and has not ended
    the other.
    """
    if _is_terminal():
        _say(_SHOW_CURSOR + "\r\n")


def _note(number: int, frame: FrameType | None) -> None:
    global _asked, _asked_at, _raised
    now = time.monotonic()
    if _asked is not None:
        if number == signal.SIGINT and now - _asked_at > TWICE:
            _end_now(number)
        return
    _asked, _asked_at = signal.Signals(number), now
    if _is_importing(frame):
        _end_now(number)
    if not _deferring:
        _raised = Stopped(number)
        raise _raised
    if number == signal.SIGINT:
        begin = _BEGIN_LINE if _is_terminal() else ""
        _say(f"{begin}[erniekit] Ctrl-C: this step is finished and saved first; Ctrl-C again ends at once\n")


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported. Packages, Paddle among them, print what they make of an exception there."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_now(number: int) -> None:
    """Without unwinding: a KeyboardInterrupt does not always get through native code, and Python's end waits for
    threads. Files that were being written have temporary names; data workers end when their input does.
    """
    restore_terminal()
    if not heartbeat.fail(interrupted(number)):
        _say(f"{interrupted(number)}\n")
    os._exit(128 + number)


def _is_terminal() -> bool:
    try:
        return os.isatty(2)
    except OSError:
        return False


def _say(text: str) -> None:
    """Past Python's streams: the signal may have come in the middle of a write to one of them."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
