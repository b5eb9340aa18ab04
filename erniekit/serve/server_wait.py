"""Waiting for items with a limit of time, cheaply enough for every token, so that a cancellation always arrives."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items for one task of the event loop that made it, which takes one after another.

    A queue under asyncio.wait_for would make a task and a timer for each item, and before Python 3.12 forgets a
    cancellation that comes in the same turn of the event loop as an item: with tokens that come every few milliseconds
    that is often, and the answer to a client that has left would be computed to its end. Here a wait is a future alone,
    and one timer, which is set again only when it has run, serves all waits.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0  # the time of the event loop at which the wait ends
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no item is there."""
        return not self._items

    def put(self, item: T) -> None:
        """Add an item."""
        self._items.append(item)
        self._end_wait()

    async def get(self, seconds: float) -> T | None:
        """The next item; None if none comes within `seconds`."""
        if not self._items:
            loop = asyncio.get_running_loop()
            self._waiter, self._until = loop.create_future(), loop.time() + seconds
            if self._timer is None or self._timer.when() > self._until:
                self._set_timer(loop)
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        """End the timer; nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._timer = loop.call_at(self._until, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if loop.time() < self._until:
            self._set_timer(loop)
        else:
            self._end_wait()

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
