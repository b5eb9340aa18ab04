"""Standard streams that are closed at the start (`erniekit train >&-`) or later (`2>&1 | head`, a terminal that goes).

Losing them must not end a run: nobody reads the words, but the checkpoints are wanted.
"""

import contextlib
import io
import os
import sys
from typing import TextIO, cast


class _Forgiving(io.FileIO):
    """A file descriptor to which everything can be written, whether or not anybody gets it."""

    def write(self, data: object) -> int:
        """Drop what cannot be written."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError:
            return len(cast(bytes, data))


def prepare() -> None:
    """Open what is closed, so that no file of ours gets a standard stream's number and a stray message from native
    code; and make messages to stderr get lost rather than fail.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            discard(number, mode)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if vars(sys)[name] is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 it lives as long as the process
    if sys.stderr is sys.__stderr__ and _number(sys.stderr) == 2:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(2, "w", closefd=False)),
            encoding=sys.stderr.encoding,
            errors=sys.stderr.errors,
            line_buffering=True,
        )


def discard(number: int, mode: int = os.O_WRONLY) -> None:
    """Point a standard stream at nothing."""
    null = os.open(os.devnull, mode)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _number(stream: TextIO) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return stream.fileno()
    return None
