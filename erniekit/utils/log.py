"""Logs plain lines to stderr; stdout is for answers and tables."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stderr(logging.Handler):
    """Writes to the current sys.stderr, which a progress bar replaces to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_logger = logging.getLogger("erniekit")
_handler = _Stderr()
_handler.setFormatter(logging.Formatter("[erniekit] %(message)s"))
_logger.addHandler(_handler)
_logger.setLevel(logging.INFO)
_logger.propagate = False
_said: set[str] = set()  # the messages of `once`
# Paddle lets every library's INFO lines through; matplotlib has one about its list of fonts.
logging.getLogger("matplotlib").setLevel(logging.WARNING)


def set_rank(rank: int) -> None:
    """Prefix this process's log lines with its rank, except on rank 0."""
    if rank:
        _handler.setFormatter(logging.Formatter(f"[erniekit {rank}] %(message)s"))


def info(message: str) -> None:
    """Log something that the user may want to know."""
    _logger.info(message)


def warning(message: str) -> None:
    """Log something that the user should act on."""
    _logger.warning("warning: %s", message)


class _Collector(logging.Handler):
    def __init__(self, lines: list[tuple[bool, str]]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        self.lines.append((is_warning, record.getMessage().removeprefix("warning: ")))


@contextmanager
def captured() -> Iterator[list[tuple[bool, str]]]:
    """A context that collects log lines as (is_warning, text) instead of writing them to stderr."""
    global _said
    lines: list[tuple[bool, str]] = []
    collector = _Collector(lines)
    before = list(_logger.handlers)  # not always `_handler`: one capture may be inside another
    _logger.handlers[:] = [collector]
    # What the user was told is collected all the same, and what is collected the user has not been told.
    said, _said = _said, set()
    try:
        yield lines
    finally:
        _logger.handlers[:], _said = before, said


def once(message: str) -> None:
    """Log a warning only the first time, such as one about a file that is read several times."""
    if message not in _said:
        _said.add(message)
        warning(message)
