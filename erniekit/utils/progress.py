"""Progress of long work outside of training: a bar on a terminal, otherwise a log line now and then."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from erniekit.utils import log

_SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, what: str, done: Callable[[Item], int] | None = None) -> Iterator[Item]:
    """The items, while showing how many of `total` have passed: "what: 1200 of 5000". Where they are not counted by
    number, `done` says of an item how much is done with it.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _with_lines(items, total, what, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        for number, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=number if done is None else done(item))


def _with_lines(items: Iterable[Item], total: int, what: str, done: Callable[[Item], int] | None) -> Iterator[Item]:
    due = time.monotonic() + _SECONDS_BETWEEN_LINES
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() > due:
            log.info(f"{what}: {number if done is None else done(item):,} of {total:,}")
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
