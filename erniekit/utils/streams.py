"""Makes the standard streams accept any text and tolerate being closed, at the start (`>&-`) or later (`| head`).

A failure to write to standard error must not end a run, whose terminal may have been closed. Standard output carries
answers, so a failure to write them is an error.
"""

import io
import os
import sys
from typing import Any, TextIO

from erniekit.utils.errors import UserError


def prepare() -> None:
    """Prepare the standard streams: unencodable characters are replaced, and closed streams are opened again.

    A closed stream (`>&-`) is opened as /dev/null. The next file to be opened would otherwise get its descriptor, and
    with it the output of libraries. Undecodable bytes of standard input become surrogates, which the reader decodes
    (`decode`) or refuses.
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
    """A file whose write errors are ignored."""

    def write(self, data: Any) -> int:
        """Write the data, or drop it if that fails."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def read_line() -> str | None:
    """The next line of standard input without its line break, also that of Windows; None at the end. Raises UserError
    for bytes that are text neither in the stream's encoding nor in UTF-8.
    """
    try:
        line = sys.stdin.readline()
    except UnicodeError as error:
        raise _not_text(error) from None
    return decode(line.removesuffix("\n").removesuffix("\r")) if line else None


def decode(line: str) -> str:
    """A line of standard input as text. A line that the stream's encoding could not decode (Chinese in an ASCII locale)
    is decoded as UTF-8. Raises UserError if that is not possible.
    """
    if line.isascii() or not any("\udc80" <= character <= "\udcff" for character in line):
        return line
    try:
        return line.encode(sys.stdin.encoding or "utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise _not_text(error) from None


def _not_text(error: UnicodeError) -> UserError:
    return UserError(
        f"standard input is not text in {sys.stdin.encoding} ({error}). Set PYTHONIOENCODING to the encoding that it "
        "is in, such as utf-8 or gbk."
    )


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
    """Flush the standard streams. Text that can no longer be written (the reader is gone, the disk is full) is dropped,
    since Python would report it again at exit.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a stream to /dev/null."""
    try:
        number = stream.fileno()
    except OSError:  # the stream has no file descriptor, as in notebooks and tests
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def is_gone(stream: TextIO) -> bool:
    """Whether the reader of a stream has closed it (`erniekit help | head -1`)."""
    import select

    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:
        return False
    return bool(poll.poll(0))
