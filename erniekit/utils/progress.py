"""Shows the progress of long work outside of training: a bar on a terminal, otherwise occasional log lines."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from erniekit.utils import log

_SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def track(
    items: Iterable[Item], total: int, title: str, progress_of: Callable[[Item], int] | None = None
) -> Iterator[Item]:
    """Yields the items while showing the progress towards `total`: "title: 1200 of 5000". If `progress_of` is given, it
    returns the progress after an item; otherwise items are counted.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _with_lines(items, total, title, progress_of)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        for number, item in enumerate(items, 1):
            yield item
            bar.update(task, completed=number if progress_of is None else progress_of(item))


def _with_lines(
    items: Iterable[Item], total: int, title: str, progress_of: Callable[[Item], int] | None
) -> Iterator[Item]:
    due = time.monotonic() + _SECONDS_BETWEEN_LINES
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() > due:
            log.info(f"{title}: {number if progress_of is None else progress_of(item):,} of {total:,}")
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
