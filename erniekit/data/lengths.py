"""How many tokens each record of a data set has: what the number of rows, and so of steps, is counted from.

Up to MEASURED_BYTES of records are all encoded, by worker processes, and the counts are exact. Of more data a sample
is encoded, spread evenly over the files; every other record is then taken to have the documents of the measured record
of its source that comes next to it in size (hot-deck imputation), so that dropped records, several documents of one
record and truncation need no model of their own. What was measured is kept in the user's cache directory, under a
fingerprint of everything that it depends on.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.data.records.dataset import Dataset
from erniekit.data.sampler import random_bits
from erniekit.data.workers import EncodingService
from erniekit.utils import atomic, log
from erniekit.utils.errors import DataError
from erniekit.utils.progress import track
from erniekit.utils.runtime import cache_directory, num_cores
from erniekit.utils.user_files import open_regular
from erniekit.utils.version import __version__

MEASURED_BYTES = 48 << 20  # some 8 seconds of two cores with ERNIE's tokenizer
_FEW_BYTES = 2 << 20  # less than this is encoded sooner than a worker has started
_SLOW_SECONDS = 2.0  # what took longer to measure is kept, as is what workers measured
_KEPT_FILES = 50
_FORMAT = 2  # of a kept file
_MIN_SAMPLES = 64
_SEED = 7  # of the sample, which need not change with the run's seed


@dataclass(frozen=True)
class Lengths:
    """Token counts of the documents of all N records. Record n has tokens[starts[n] : starts[n] + counts[n]], and so
    for the patches of their pictures.

    starts int64 [N], counts int32 [N], tokens int32 [M], patches int32 [M]. `num_measured` of the records were encoded,
    `num_dropped` of these gave no document, `num_truncated` lost a part, and of `num_shrunk` pictures were made smaller
    to fit.
    """

    starts: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    num_measured: int
    num_dropped: int
    num_truncated: int
    num_shrunk: int

    @property
    def exact(self) -> bool:
        """Whether every record was encoded."""
        return self.num_measured == len(self.starts)

    @property
    def total_tokens(self) -> int:
        """Tokens of all records, estimated where not exact."""
        sums = np.concatenate([[0], np.cumsum(self.tokens, dtype=np.int64)])
        return int((sums[self.starts + self.counts] - sums[self.starts]).sum())

    def of(self, number: int) -> list[int]:
        """The tokens of each document of a record."""
        start = self.starts[number]
        return self.tokens[start : start + self.counts[number]].tolist()

    def patches_of(self, number: int) -> list[int]:
        """The patches of each document of a record."""
        start = self.starts[number]
        return self.patches[start : start + self.counts[number]].tolist()


@dataclass(frozen=True)
class _Measured:
    """Of the encoded records: their numbers int64 [K], documents each int32 [K], and those documents' tokens and
    patches [M].
    """

    numbers: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    num_dropped: int
    num_truncated: int
    num_shrunk: int


def choose_sample(dataset: Dataset, max_samples: int) -> np.ndarray:
    """The numbers of the records to encode, ascending: all of them, or as many as are allowed, one from each of equal
    stretches of the data set.
    """
    size, total_bytes = len(dataset), int(dataset.record_bytes.sum())
    share = min(1.0, MEASURED_BYTES / max(total_bytes, 1))
    wanted = min(max_samples, max(int(size * share), _MIN_SAMPLES))
    if wanted >= size:
        return np.arange(size)
    inside = (random_bits((_SEED,), 0, wanted) >> np.uint64(11)) * 2.0**-53
    return np.unique(((np.arange(wanted) + inside) * (size / wanted)).astype(np.int64))


def measure_lengths(dataset: Dataset, service: EncodingService, max_samples: int) -> Lengths:
    """The lengths of all records, read from the cache or measured now. Where no record of the sample can be used, all
    are measured: others may be usable.
    """
    lengths = _measure(dataset, service, choose_sample(dataset, max_samples))
    if lengths.exact or len(lengths.tokens):
        return lengths
    log.info(f"data: all {lengths.num_measured:,} samples measured were dropped; measuring all {len(dataset):,}")
    return _measure(dataset, service, np.arange(len(dataset)))


def _measure(dataset: Dataset, service: EncodingService, numbers: np.ndarray) -> Lengths:
    file = _cache_file(dataset, numbers, service.lengths_depend_on())
    large = int(dataset.record_bytes[numbers].sum()) >= _FEW_BYTES
    with _one_at_a_time(file) if large else nullcontext():
        measured = _read(file, numbers)
        if measured is None:
            begin = time.monotonic()
            measured = _encode(service, numbers, num_cores() if large else None)
            if large or time.monotonic() - begin > _SLOW_SECONDS:
                _keep(file, measured)
    return _for_all(dataset, measured)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Wait while another process measures the same data, such as another rank of this host: every rank needs the
    lengths at the same time, and workers of one are enough to occupy all cores. The lock ends with its process.
    """
    lock, descriptor = file.with_suffix(".lock"), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # this file system has no locks, or nothing can be written: every process measures for itself
    try:
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # a process that waits has the file open, and finds the lengths kept
            os.close(descriptor)


def _encode(service: EncodingService, numbers: np.ndarray, workers: int | None) -> _Measured:
    counts = np.zeros(len(numbers), np.int32)
    tokens: list[int] = []
    patches: list[int] = []
    dropped = truncated = shrunk = 0
    with closing(service.stream(numbers.tolist(), workers)) as encoded:
        shown = track(encoded, len(numbers), "data: measuring samples") if workers else encoded
        for place, record in enumerate(shown):
            counts[place] = len(record.documents)
            tokens += [len(document.ids) for document in record.documents]
            patches += [document.num_patches for document in record.documents]
            dropped += bool(record.dropped)
            truncated += record.cut
            shrunk += record.shrunk
    sizes = np.array(tokens, np.int32), np.array(patches, np.int32)
    return _Measured(numbers, counts, *sizes, dropped, truncated, shrunk)


def _for_all(dataset: Dataset, measured: _Measured) -> Lengths:
    """Every record's documents: its own, or those of the measured record that stands for it."""
    first = np.concatenate([[0], np.cumsum(measured.counts, dtype=np.int64)])[:-1]
    which = np.empty(len(dataset), np.int64)  # the measured record that stands for each record
    begin = 0
    for size in dataset.sizes:
        end = begin + size
        low, high = np.searchsorted(measured.numbers, (begin, end))
        if low == high:  # a tiny source of which the sample has nothing
            low, high = 0, len(measured.numbers)
        which[begin:end] = low + _nearest(
            dataset.record_bytes[measured.numbers[low:high]], dataset.record_bytes[begin:end]
        )
        begin = end
    which[measured.numbers] = np.arange(len(measured.numbers))
    return Lengths(
        first[which],
        measured.counts[which],
        measured.tokens,
        measured.patches,
        len(measured.numbers),
        measured.num_dropped,
        measured.num_truncated,
        measured.num_shrunk,
    )


def _nearest(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of `wanted` the index of the nearest of `known`; of several equal ones each has its turn."""
    order = np.argsort(known, kind="stable")
    values = known[order]
    left, right = np.searchsorted(values, wanted, "left"), np.searchsorted(values, wanted, "right")
    turn = left + np.arange(len(wanted)) % np.maximum(right - left, 1)
    below, above = np.maximum(left - 1, 0), np.minimum(left, len(values) - 1)
    nearer = np.where(wanted - values[below] <= values[above] - wanted, below, above)
    return order[np.where(right > left, turn, nearer)]


def _cache_file(dataset: Dataset, numbers: np.ndarray, depends_on: dict[str, Any]) -> Path:
    files = []
    for source in dataset.sources:
        for data in source.files:
            status = data.path.stat()
            files.append([source.spec.type, str(data.path.resolve()), status.st_size, status.st_mtime_ns, len(data)])
    everything = [_FORMAT, __version__, files, depends_on, len(numbers)]
    digest = hashlib.sha256(json.dumps(everything, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "lengths" / f"{digest[:32]}.npz"


def _read(file: Path, numbers: np.ndarray) -> _Measured | None:
    """What was kept; None if there is nothing, or nothing that can be used."""
    try:
        with open_regular(file, DataError) as opened, np.load(opened, allow_pickle=False) as archive:
            counts, tokens, patches, totals = (archive[name] for name in ("counts", "tokens", "patches", "totals"))
    except FileNotFoundError:
        return None
    except DataError as error:
        log.warning(f"kept lengths are not used, measuring again: {error}")
        return None
    except Exception as error:  # zipfile, numpy and the system each raise their own for a broken file
        log.warning(f"{file}: kept lengths cannot be read ({error}); measuring again")
        return None
    if not _is_possible(counts, tokens, patches, totals, len(numbers)):
        log.warning(f"{file}: kept lengths are not those of {len(numbers):,} samples; measuring again")
        return None
    log.info(f"data: lengths of {len(numbers):,} samples, measured earlier, are in {file}")
    return _Measured(numbers, counts, tokens, patches, *(int(total) for total in totals))


def _is_possible(counts: np.ndarray, tokens: np.ndarray, patches: np.ndarray, totals: np.ndarray, size: int) -> bool:
    """Whether these can be the lengths of `size` records. A file may be damaged, or another program's."""
    if any(array.dtype != np.int32 for array in (counts, tokens, patches)) or totals.dtype != np.int64:
        return False
    if counts.shape != (size,) or tokens.ndim != 1 or patches.shape != tokens.shape or totals.shape != (3,):
        return False
    signs = min(counts.min(initial=0), patches.min(initial=0), totals.min()) >= 0 and tokens.min(initial=1) > 0
    return bool(signs) and int(counts.sum(dtype=np.int64)) == len(tokens) and int(totals.max()) <= size


def _keep(file: Path, measured: _Measured) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        totals = np.array([measured.num_dropped, measured.num_truncated, measured.num_shrunk], np.int64)
        with atomic.new_file(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, counts=measured.counts, tokens=measured.tokens, patches=measured.patches, totals=totals)
        _remove_oldest(sorted(file.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime))
    except OSError as error:
        log.info(
            f"data: measured lengths cannot be kept in {file.parent} ({error.strerror}); a new start measures again"
        )


def _remove_oldest(files: Sequence[Path]) -> None:
    for path in files[:-_KEPT_FILES]:
        path.unlink(missing_ok=True)
