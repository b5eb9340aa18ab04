"""The ordered pool gives results in order, keeps few of them, and stops at an error."""

import threading
from collections.abc import Iterator

import pytest

from erniekit.utils.ordered_pool import in_order


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_results_are_in_order_and_few(num_threads: int):
    """The first calls end last; at most one item more than threads is taken before its turn."""
    taken: list[int] = []
    later = threading.Event()

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    def square(item: int) -> int:
        if item == 0 and num_threads > 1:
            assert later.wait(10)
        if item == 1:
            later.set()
        return item * item

    results = []
    for result in in_order(square, items(), num_threads):
        results.append(result)
        assert len(taken) - len(results) <= (num_threads if num_threads > 1 else 0)
    assert results == [item * item for item in range(20)]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_is_raised_in_its_place_and_ends_the_work(num_threads: int):
    called: list[int] = []

    def work(item: int) -> int:
        called.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    results = []
    with pytest.raises(ValueError, match="two"):
        for result in in_order(work, range(100), num_threads):
            results.append(result)
    assert results == [0, 1] and len(called) <= 3 + num_threads


def test_no_items():
    assert list(in_order(str, [], 3)) == []
