"""An inbox: items, the limit of time, and cancellations that come together with an item."""

import asyncio
import time

import pytest

from erniekit.serve.server_wait import Inbox


def test_items_come_in_order_and_a_limit_ends_a_wait():
    async def main() -> None:
        inbox: Inbox[int] = Inbox()
        inbox.put(1)
        inbox.put(2)
        assert [await inbox.get(10.0), await inbox.get(10.0)] == [1, 2] and inbox.is_empty
        asyncio.get_running_loop().call_later(0.02, inbox.put, 3)
        assert await inbox.get(10.0) == 3
        begun = time.monotonic()
        assert await inbox.get(0.02) is None, "the timer of the wait before is later"
        assert 0.02 <= time.monotonic() - begun < 5
        inbox.close()

    asyncio.run(main())


def test_a_timer_that_runs_early_waits_for_the_rest():
    async def main() -> None:
        inbox: Inbox[int] = Inbox()
        asyncio.get_running_loop().call_later(0.01, inbox.put, 1)
        assert await inbox.get(0.05) == 1  # its timer stays
        begun = time.monotonic()
        assert await inbox.get(0.1) is None
        assert time.monotonic() - begun >= 0.099

    asyncio.run(main())


def test_a_cancellation_is_not_lost_where_an_item_comes_in_the_same_turn():
    async def main() -> None:
        inbox: Inbox[int] = Inbox()
        waiting = asyncio.ensure_future(inbox.get(10.0))
        await asyncio.sleep(0)
        inbox.put(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await inbox.get(10.0) == 1
        inbox.close()

    asyncio.run(main())
