"""Items that are made ahead: how many, and in which order."""

import threading
import time

import pytest

from erniekit.data.prefetch import Prefetcher


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_items_are_made_than_may_wait(depth):
    """An item takes its place before it is made, so that memory holds `depth` items beside the one in use."""
    made = []

    def produce():
        for number in range(10):
            made.append(number)
            yield number

    items = Prefetcher(produce, depth)
    try:
        for taken in range(5):
            wait_until(lambda taken=taken: len(made) >= taken + depth)
            time.sleep(0.05)
            assert len(made) == taken + depth
            assert items.next() == taken
        assert [items.next() for _ in range(5)] == [5, 6, 7, 8, 9]
        for _ in range(2):
            with pytest.raises(StopIteration):
                items.next()
    finally:
        items.stop()


def test_an_error_comes_after_the_items_before_it():
    def produce():
        yield 1
        raise ValueError("bad")

    items = Prefetcher(produce, 2)
    assert items.next() == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            items.next()
    items.stop()


def test_a_thread_that_waits_for_a_place_ends():
    closed = threading.Event()

    def produce():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = Prefetcher(produce, 1)
    assert items.next() == 0
    items.stop()
    assert closed.wait(5)
    with pytest.raises(StopIteration):
        items.next()
