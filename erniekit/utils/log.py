"""Plain log lines on stderr, so that stdout stays free for answers and tables."""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stderr(logging.Handler):
    """Writes to what sys.stderr is at that moment: a progress bar stands in its place to keep lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_logger = logging.getLogger("erniekit")
_handler = _Stderr()
_handler.setFormatter(logging.Formatter("[erniekit] %(message)s"))
_logger.addHandler(_handler)
_logger.setLevel(logging.INFO)
_logger.propagate = False


def set_rank(rank: int) -> None:
    """Begin the lines of all ranks but the first with their number; each rank has a stream of its own."""
    if rank:
        _handler.setFormatter(logging.Formatter(f"[erniekit {rank}] %(message)s"))


def info(message: str) -> None:
    """Say something the user may want to know."""
    _logger.info(message)


def warning(message: str) -> None:
    """Say something the user should act on."""
    _logger.warning("warning: %s", message)


class _Kept(logging.Handler):
    def __init__(self, lines: list[tuple[bool, str]]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        self.lines.append((is_warning, record.getMessage().removeprefix("warning: ")))


@contextmanager
def captured() -> Iterator[list[tuple[bool, str]]]:
    """The lines said inside, as (whether it is a warning, text), instead of on stderr."""
    lines: list[tuple[bool, str]] = []
    kept = _Kept(lines)
    once.cache_clear()
    before = list(_logger.handlers)  # not always `_handler`: one capture may be inside another
    _logger.handlers[:] = [kept]
    try:
        yield lines
    finally:
        _logger.handlers[:] = before


@functools.cache
def once(message: str) -> None:
    """A warning about a file, which one process may read several times."""
    warning(message)
