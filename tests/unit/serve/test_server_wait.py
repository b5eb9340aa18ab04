"""Waiting with a limit: results, the limit, and cancellations that come together with the result."""

import asyncio

import pytest

from erniekit.serve.server_wait import within


def test_a_result_comes_back_and_a_limit_ends_the_work():
    async def main() -> None:
        assert await within(10.0, asyncio.sleep(0, "done")) == "done"
        queue: asyncio.Queue[int] = asyncio.Queue()
        with pytest.raises(asyncio.TimeoutError):
            await within(0.001, queue.get())
        queue.put_nowait(5)
        assert await within(10.0, queue.get()) == 5, "the work that was given up takes nothing"

    asyncio.run(main())


def test_a_cancellation_is_not_lost_where_the_result_comes_in_the_same_turn():
    async def main() -> None:
        result: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def work() -> int:
            return await result

        waiting = asyncio.ensure_future(within(10.0, work()))
        for _ in range(3):
            await asyncio.sleep(0)
        result.set_result(1)
        await asyncio.sleep(0)  # the work has ended, and `within` has not heard of it
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
