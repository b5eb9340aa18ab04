"""Work on many items by several threads, with results in order and a bounded number of them in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """`function` of each item, in the order of the items, computed by `num_threads` threads: of use where it spends its
    time outside Python, in large numpy operations, checksums and files.

    At most num_threads + 1 results are computed, waiting or with the caller at a time, if the caller keeps none. The
    first error of an item, in their order, is raised where its result would be; then no further item is started, and
    the calls that are running are waited for. With one thread everything runs in the caller's thread.
    """
    if num_threads == 1:
        for item in items:
            yield function(item)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, "erniekit-ordered") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
