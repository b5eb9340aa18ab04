"""Prefetching: a background thread that keeps a few items ready."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End(Exception):
    """Marks the end of the producer's items."""


class Prefetcher(Generic[Item]):
    """Runs `produce()` in a daemon thread, at most `depth` items ahead. next() raises exceptions of the thread after
    the items that came before them.

    stop() calls `interrupt`, if given, to wake a producer that waits for something other than this queue.
    """

    def __init__(
        self,
        produce: Callable[[], Generator[Item, None, None]],
        depth: int,
        interrupt: Callable[[], None] | None = None,
    ):
        self._produce, self._interrupt = produce, interrupt
        self._queue: queue.Queue[Item | BaseException] = queue.Queue()
        self._places = threading.Semaphore(max(1, depth))  # for items that are being made or wait
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="erniekit-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        items = None
        try:
            items = self._produce()
            while self._has_place():
                self._queue.put(next(items))
        except StopIteration:
            self._queue.put(_End())
        except BaseException as error:  # any exception is passed on to the thread that calls next()
            self._queue.put(error)
        finally:
            if items is not None:
                items.close()

    def _has_place(self) -> bool:
        """Wait until another item may be made; False when the thread is to end. An item takes its place before it is
        made, since a step of many microbatches is large.
        """
        while not self._stopping.is_set():
            if self._places.acquire(timeout=0.1):
                return True
        return False

    def next(self) -> Item:
        """The next item. Raises StopIteration at the end, or the producer's exception, on this and every later call."""
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                self._places.release()
                return item
            self._failure = item
        if isinstance(self._failure, _End):
            raise StopIteration
        raise self._failure

    def stop(self) -> None:
        """End the thread and discard the items. It may be called more than once."""
        self._stopping.set()
        self._failure = self._failure or _End()
        if self._interrupt is not None:
            self._interrupt()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(timeout=10)
