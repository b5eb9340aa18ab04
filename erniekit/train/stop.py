"""SIGTERM as a wish: the scheduler wants the machine back, the trainer ends the step it is in and saves."""

import signal
import threading
from types import FrameType

_asked = False


def listen() -> None:
    """From now on SIGTERM is noted instead of ending the process. Does nothing where a signal cannot be caught (not the
    main thread) or where Python code of somebody else catches it. Importing Paddle puts a handler of its own in the
    place of ours: call this again after it.
    """
    ours = signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _note)
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note)


def asked() -> bool:
    """Whether SIGTERM has come to this process. Ranks may get it at different steps: they have to agree on one."""
    return _asked


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
