"""Decoding the pictures of packed batches, in worker processes: only those of the batches that this rank trains on."""

import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from erniekit.data.packed_batch import IGNORE, PackedBatch, PictureTable
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.workers import Worker
from erniekit.utils import log
from erniekit.utils.errors import DataError

_SHOWN_FAILURES = 3  # the others are only counted


class Decoded(NamedTuple):
    """The patches of a picture or video, uint8 [P, 3 * patch * patch]; or why there are none. `doubts` are sentences
    about what was decided.
    """

    patches: np.ndarray | None
    failure: str
    doubts: tuple[str, ...]


def _ask_worker(free: queue.Queue[Worker], plan: MediaPlan) -> Decoded:
    """What one of the free workers makes of a plan."""
    worker = free.get()
    try:
        worker.send([(plan,)])
        done, error = worker.receive()
    finally:
        free.put(worker)
    if error is not None:
        raise error
    return done[0]


@dataclass(frozen=True)
class DecodeJob:
    """What a worker does with each plan that it is sent. With `keep` false the pixels are thrown away once decoding
    has succeeded: what is wanted is only whether it does.
    """

    keep: bool = True

    def make(self) -> "DecodeJob":
        """Itself: nothing has to be built."""
        return self

    def __call__(self, plan: MediaPlan) -> Decoded:
        notes = Notes()
        try:
            patches = plan.patches(notes)
        except BadRecord as error:
            return Decoded(None, error.message, ())
        if len(patches) != plan.geometry.patches:
            return Decoded(None, f"{plan.name} changed since its size was read", ())
        return Decoded(patches if self.keep else patches[:0], "", tuple(sorted(notes.doubts)))


class MediaDecoder:
    """Decodes the pictures of batches, `num_workers` at a time; with 0 in the calling thread.

    A picture that cannot be decoded raises DataError with its record's place; with on_bad_line "skip" the document
    keeps its place in the row, without loss and with black pictures, so that the rows are those of an undamaged run.
    `failures` counts such pictures and videos, `doubts` those of which something was decided, by what it was.
    """

    def __init__(self, num_workers: int = 0, on_bad_line: str = "error", keep: bool = True):
        self._skip_bad, self._num_workers = on_bad_line == "skip", num_workers
        self._job = DecodeJob(keep)
        self._lock = threading.Lock()  # a run and its evaluation may both begin
        self._free: queue.Queue[Worker] = queue.Queue()
        self._workers: list[Worker] = []
        self._pool: ThreadPoolExecutor | None = None
        self.failures = 0
        self._said = 0  # how many of them stop() has reported
        self.doubts: Counter[str] = Counter()

    def decode(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with the patches of their pictures."""
        plans = [plan for batch in batches for plan in batch.pictures.sources]
        if not plans:
            return list(batches)
        results = iter(self.results(plans))
        return [self._with_patches(batch, results) for batch in batches]

    def stop(self) -> None:
        """End the workers, also while another thread waits for them. They start again when they are needed."""
        with self._lock:
            pool, self._pool = self._pool, None
            workers, self._workers = self._workers, []
            self._free = queue.Queue()
            if self.failures > max(self._said, _SHOWN_FAILURES):
                self._said = self.failures
                log.warning(f"pictures and videos that could not be decoded so far: {self.failures}")
        for worker in workers:
            worker.stop()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def results(self, plans: Sequence[MediaPlan]) -> Iterator[Decoded]:
        """What each plan became, in the order of the plans, whichever is ready first."""
        if not self._num_workers:
            return map(self._job, plans)
        with self._lock:
            if self._pool is None:
                self._workers = [Worker(self._job) for _ in range(self._num_workers)]
                for worker in self._workers:
                    self._free.put(worker)
                self._pool = ThreadPoolExecutor(self._num_workers, "erniekit-decode")
            # The queue goes with the task: a thread that begins one while stop() runs finds the ended workers there,
            # whose answer is an error. In an empty new queue it would wait forever, and the process with it.
            return self._pool.map(partial(_ask_worker, self._free), plans)

    def _with_patches(self, batch: PackedBatch, results: Iterator[Decoded]) -> PackedBatch:
        table = batch.pictures
        if not table.sources:
            return batch
        patches, failed = [], set[int]()
        for plan, document in zip(table.sources, table.documents.tolist(), strict=True):
            decoded = next(results)
            where = batch.sources[document]
            self._say(decoded, where)
            if decoded.patches is None:
                if len(batch.pairs):
                    raise DataError(
                        f"{where}: {decoded.failure}. Hint: remove the pair: it has no place without a loss."
                    )
                failed.add(document)
                shape = (plan.geometry.patches, 3 * plan.patching.patch**2)
                patches.append(np.zeros(shape, np.uint8))
            else:
                patches.append(decoded.patches)
        labels = batch.labels
        if failed:
            labels = np.where(np.isin(batch.segment_ids, list(failed)), IGNORE, labels)
        decoded_table = PictureTable(np.concatenate(patches), table.grid, table.first_tokens, table.documents)
        return replace(batch, labels=labels, pictures=decoded_table)

    def _say(self, decoded: Decoded, where: str) -> None:
        """Report a failure, and each doubt once."""
        for doubt in decoded.doubts:
            self.doubts[doubt] += 1
            if self.doubts[doubt] == 1:
                log.warning(f"{where}: {doubt} (further ones are only counted)")
        if decoded.patches is not None:
            return
        if not self._skip_bad:
            raise DataError(f"{where}: {decoded.failure} (on_bad_line: skip trains without such samples)")
        self.failures += 1
        if self.failures <= _SHOWN_FAILURES:
            more = " (further ones are only counted)" if self.failures == _SHOWN_FAILURES else ""
            log.warning(f"{where}: sample without loss: {decoded.failure}{more}")
