"""Graceful handling of Ctrl-C (SIGINT), SIGTERM (a scheduler preempts the job), SIGHUP (the terminal is closed) and
SIGUSR1 (which jobs of Slurm often ask for before their time ends).

Within `deferred` a signal is only recorded: the trainer finishes its step, saves and stops. Outside it `Stopped` is
raised, except during imports, where the process ends at once. A Ctrl-C after any signal always ends the process at
once; other signals that come again change nothing, since schedulers send them twice before they kill a job.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from erniekit.utils import heartbeat

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
EXIT_INTERRUPTED = 128 + signal.SIGINT
_SHOW_CURSOR = "\x1b[?25h"
_BEGIN_LINE = "\r\x1b[K"
# `timeout -s INT` and some shells send a signal twice, to the process and to its group; that counts as one Ctrl-C.
TWICE = 0.3


class Stopped(KeyboardInterrupt):
    """A signal arrived at a time at which nothing can be saved. `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_requested: signal.Signals | None = None  # the first signal that arrived
_asked_at = 0.0
_raised: Stopped | None = None
_deferring = False
_what_is_left: Callable[[], str] = str  # returns what has been saved, for the message of an immediate end


def listen(what_is_left: Callable[[], str] | None = None, signals: Iterable[signal.Signals] = SIGNALS) -> None:
    """Install the handlers for `signals`. A signal is left alone if it cannot be caught (not the main thread), is
    ignored (nohup), or has a handler of other Python code. Importing Paddle replaces the handlers, so call this again
    after the import.

    what_is_left: returns a short description of what a process that ends now has saved.
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
def blocked(signals: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """A context in which signals wait. Threads and processes that are started in it keep them blocked: a scheduler that
    sends a signal to all processes of a job does not end the workers which the trainer needs to finish its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requested() -> signal.Signals | None:
    """The first signal that arrived, or None. Ranks may receive it at different steps, so they must agree on a step."""
    return _requested


def raised() -> Stopped | None:
    """The exception that was raised because of a signal, or None. Native code may have turned it into another exception
    before the caller sees it.
    """
    return _raised


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A context in which signals are only recorded, and the caller checks `requested` after each step."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def interrupted(number: int) -> str:
    """The message about an immediate end."""
    saved = _what_is_left()
    return f"{'interrupted' if number == signal.SIGINT else f'stopped by {signal.Signals(number).name}'}" + (
        f"; {saved}" if saved else ""
    )


def restore_terminal() -> None:
    """Show the cursor and begin a new line. A progress bar that was killed has hidden the cursor and left its line
    unfinished.
    """
    if _is_terminal():
        _say(_SHOW_CURSOR + "\r\n")


def _note(number: int, frame: FrameType | None) -> None:
    global _requested, _asked_at, _raised
    now = time.monotonic()
    if _requested is not None:
        if number == signal.SIGINT and now - _asked_at > TWICE:
            _end_now(number)
        elif _deferring and now - _asked_at > TWICE:
            _say(f"[erniekit] {signal.Signals(number).name} again: {_what_is_awaited(now)}\n")
        return
    _requested, _asked_at = signal.Signals(number), now
    if not _deferring:
        if _is_importing(frame):
            _end_now(number)
        _raised = Stopped(number)
        raise _raised
    begin, again = _BEGIN_LINE if _is_terminal() else "", "SIGINT" if number != signal.SIGINT else "Ctrl-C again"
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _say(f"{begin}[erniekit] {name}: this step is finished and saved first; {again} ends at once\n")


def _what_is_awaited(now: float) -> str:
    return f"the step that was under way {now - _asked_at:.0f} s ago is finished and saved first; SIGINT ends at once"


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception there may be caught and printed by packages such as Paddle."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_now(number: int) -> None:
    """End the process without unwinding: native code does not always pass a KeyboardInterrupt on, and Python waits for
    threads before it exits. Unfinished files have temporary names, and data workers end when their input is closed.
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
    """Write to stderr directly, since the signal may have interrupted a write to Python's stream."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
