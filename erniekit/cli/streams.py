"""Standard streams that take any text and may be closed."""

import codecs
import io
import os
import sys


def prepare() -> None:
    """Make standard output and error replace what their encoding does not have, and stand-ins of closed streams.

    A closed stream (`>&-`) is opened as /dev/null: the next file to be opened would otherwise get its number, and
    whatever a library prints. Where the locale knows ASCII only, what is typed is read as UTF-8, which contains ASCII;
    bytes that are no text become surrogates, which the reader can refuse.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _open_closed(number)
        if vars(sys)[name] is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115 open till exit
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="surrogateescape")


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


def silence(stream: "io.TextIOBase") -> None:
    """Point a stream at nothing."""
    try:
        number = stream.fileno()
    except OSError:  # not a file: a notebook's, or a test's
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def is_gone(stream: "io.TextIOBase") -> bool:
    """True if nobody reads a stream any more (`erniekit help | head -1`)."""
    import select

    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:
        return False
    return bool(poll.poll(0))
