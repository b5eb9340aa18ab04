"""Named parts of a training step, to be measured.

    with span("optimizer"): ...

Without a listener, which only a profile installs (training/profiling), a span costs the test of one variable.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Listener(Protocol):
    """Receives the spans of this process."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """A context that lasts as long as the span."""
        ...


_NOBODY: AbstractContextManager[None] = nullcontext()
_listener: Listener | None = None


def span(name: str) -> AbstractContextManager[None]:
    """The context of a part of a step. Spans may be nested."""
    return _NOBODY if _listener is None else _listener.span(name)


def listen(listener: Listener | None) -> None:
    """Pass all spans to `listener` from now on; None: to nobody."""
    global _listener
    _listener = listener
