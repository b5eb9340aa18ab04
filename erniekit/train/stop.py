"""SIGTERM as a wish: the scheduler wants the machine back, the trainer ends the step it is in and saves."""

import signal
import threading
from types import FrameType

_asked = False


def listen() -> None:
    """From now on SIGTERM is noted instead of ending the process. Does nothing where a signal cannot be caught (not the
    main thread) or somebody else already catches it.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _note)


def asked() -> bool:
    """Whether SIGTERM has come to this process. Ranks may get it at different steps: they have to agree on one."""
    return _asked


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
