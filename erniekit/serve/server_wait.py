"""Waiting with a limit of time, so that a cancellation always arrives."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises asyncio.TimeoutError, and cancels it, if it takes longer than `seconds`.

    asyncio.wait_for is not used because before Python 3.12 it returns the result, and forgets the cancellation, where
    both come in the same turn of the event loop. With tokens that come every few milliseconds that is often, and the
    answer to a client that has left would be computed to its end.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
        if not done:
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
