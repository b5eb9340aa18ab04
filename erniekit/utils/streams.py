"""Standard streams that take any text and may be closed, at the start (`>&-`) or later (`2>&1 | head`).

Losing standard error must not end a run, whose terminal may have gone: nobody reads the words, the checkpoints are
wanted. Standard output carries answers, and a failure to write them is an error.
"""

import io
import os
import sys
from typing import Any, TextIO

from erniekit.utils.errors import UserError


def prepare() -> None:
    """Make standard output and error replace what their encoding does not have, and stand-ins of closed streams.

    A closed stream (`>&-`) is opened as /dev/null: the next file to be opened would otherwise get its number, and
    whatever a library prints. Bytes of standard input that its encoding does not have become surrogates, for the reader
    to make sense of (`decode`) or to refuse.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _open_closed(number)
        if vars(sys)[name] is None:
            opened = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115 open till exit
            setattr(sys, name, opened)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Forgiving(sys.stderr.fileno(), "w", closefd=False)),
            encoding=sys.stderr.encoding,
            errors="replace",
            line_buffering=True,
        )


class _Forgiving(io.FileIO):
    """A file descriptor to which everything can be written, whether or not anybody gets it."""

    def write(self, data: Any) -> int:
        """Drop what cannot be written."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def read_line() -> str | None:
    """The next line of standard input without its end; None when there is none. UserError for bytes that are no text
    in an encoding that cannot hold them as surrogates (UTF-16).
    """
    try:
        line = sys.stdin.readline()
    except UnicodeError as error:
        raise UserError(
            f"standard input is not text in {sys.stdin.encoding} ({error}). Set PYTHONIOENCODING to the encoding that "
            "it is in, such as utf-8."
        ) from None
    return decode(line.removesuffix("\n")) if line else None


def decode(line: str) -> str:
    """A line of standard input; one that its encoding could not read (Chinese where the locale knows ASCII) is UTF-8
    if it can be.
    """
    if line.isascii() or not any("\udc80" <= character <= "\udcff" for character in line):
        return line
    try:
        return line.encode(sys.stdin.encoding or "utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return line


def _open_closed(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_WRONLY if number else os.O_RDONLY)
        if opened == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(opened, number)
            os.close(opened)


def flush() -> None:
    """Bring out what was printed. What cannot be written any more (nobody reads it, the disk is full) is dropped:
    Python would complain about it once more at exit.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Point a stream at nothing."""
    try:
        number = stream.fileno()
    except OSError:  # not a file: a notebook's, or a test's
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def is_gone(stream: TextIO) -> bool:
    """True if nobody reads a stream any more (`erniekit help | head -1`)."""
    import select

    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:
        return False
    return bool(poll.poll(0))
