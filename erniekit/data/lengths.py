"""Measures how many tokens each record of a data set has, from which the number of rows and steps is computed.

Up to MEASURED_BYTES of records are all encoded, by worker processes, and the counts are exact. For more data, a sample
spread evenly over the files is encoded. Every other record is then assumed to have the same documents as the measured
record of its source that is closest in bytes (hot-deck imputation). In this way dropped records, truncation and records
with several documents need no separate models. Measurements are cached in the user's cache directory, under a
fingerprint of everything that they depend on.
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
from erniekit.data.sampler import uniform_numbers
from erniekit.data.workers import EncodingService
from erniekit.utils import atomic, log
from erniekit.utils.errors import DataError
from erniekit.utils.progress import track
from erniekit.utils.runtime import cache_directory, num_cores
from erniekit.utils.user_files import open_regular
from erniekit.utils.version import __version__

MEASURED_BYTES = 48 << 20  # about 8 seconds on two cores with ERNIE's tokenizer
_FEW_BYTES = 2 << 20  # smaller data is encoded before a worker would have started
_SLOW_SECONDS = 2.0  # a measurement is cached if it took longer than this, or used workers
_KEPT_FILES = 50
_FORMAT = 3  # of a kept file
_MIN_SAMPLES = 64
_SEED = 7  # the seed of the sample, which does not depend on the run's seed


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
        """The number of tokens of all records; an estimate unless `exact`."""
        sums = np.concatenate([[0], np.cumsum(self.tokens, dtype=np.int64)])
        return int((sums[self.starts + self.counts] - sums[self.starts]).sum())

    def of(self, numbers: np.ndarray) -> list[int]:
        """The number of tokens of each document of the records `numbers`, int64 [K], in their order."""
        return self.tokens[self._documents(numbers)].tolist()

    def patches_of(self, numbers: np.ndarray) -> list[int]:
        """The patches of each document of the records `numbers`, int64 [K], in their order."""
        return self.patches[self._documents(numbers)].tolist()

    def _documents(self, numbers: np.ndarray) -> np.ndarray:
        """Where the documents of records are in `tokens`, int64."""
        counts = self.counts[numbers].astype(np.int64)
        ends = np.cumsum(counts)
        return np.repeat(self.starts[numbers] - (ends - counts), counts) + np.arange(counts.sum())


@dataclass(frozen=True)
class _Measured:
    """The encoded records: their numbers int64 [K], how many documents each has int32 [K], and the tokens and patches
    of those documents [M].
    """

    numbers: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    num_dropped: int
    num_truncated: int
    num_shrunk: int


def choose_sample(dataset: Dataset, max_samples: int) -> np.ndarray:
    """The numbers of the records to encode, ascending: all of them, or as many as allowed. The data set is divided into
    that many equal parts, and one record is drawn from each (stratified sampling).
    """
    size, total_bytes = len(dataset), int(dataset.record_bytes.sum())
    share = min(1.0, MEASURED_BYTES / max(total_bytes, 1))
    sample_size = min(max_samples, max(int(size * share), _MIN_SAMPLES))
    if sample_size >= size:
        return np.arange(size)
    places = np.arange(sample_size) + uniform_numbers((_SEED,), 0, sample_size)
    return np.unique((places * (size / sample_size)).astype(np.int64))


def measure_lengths(dataset: Dataset, service: EncodingService, max_samples: int) -> Lengths:
    """The lengths of all records, read from the cache or measured now. If the whole sample was dropped, all records are
    measured, since others may be usable.
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
    """A context that waits while another process measures the same data, such as another rank of this host: all ranks
    need the lengths at the same time, and the workers of one rank already occupy all cores. The lock ends with its
    process.
    """
    lock, descriptor = file.with_suffix(".lock"), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # without locks, or without write permission, every process measures for itself
    try:
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)  # a waiting process has the file open, and will find the lengths in the cache
            os.close(descriptor)


def _encode(service: EncodingService, numbers: np.ndarray, workers: int | None) -> _Measured:
    counts = np.zeros(len(numbers), np.int32)
    tokens: list[int] = []
    patches: list[int] = []
    dropped = truncated = shrunk = 0
    with closing(service.stream(numbers.tolist(), workers)) as encoded:
        tracked = track(encoded, len(numbers), "data: measuring samples") if workers else encoded
        for index, record in enumerate(tracked):
            counts[index] = len(record.documents)
            tokens += [len(document.ids) for document in record.documents]
            patches += [document.num_patches for document in record.documents]
            dropped += bool(record.dropped)
            truncated += record.cut
            shrunk += record.shrunk
    sizes = np.array(tokens, np.int32), np.array(patches, np.int32)
    return _Measured(numbers, counts, *sizes, dropped, truncated, shrunk)


def _for_all(dataset: Dataset, measured: _Measured) -> Lengths:
    """The lengths of all records: measured, or copied from the measured record that represents the record."""
    first = np.concatenate([[0], np.cumsum(measured.counts, dtype=np.int64)])[:-1]
    representative = np.empty(len(dataset), np.int64)  # the index of the measured record that represents each record
    begin = 0
    for size in dataset.sizes:
        end = begin + size
        low, high = np.searchsorted(measured.numbers, (begin, end))
        if low == high:  # a small source without a measured record uses those of all sources
            low, high = 0, len(measured.numbers)
        representative[begin:end] = low + _nearest(
            dataset.record_bytes[measured.numbers[low:high]], dataset.record_bytes[begin:end]
        )
        begin = end
    representative[measured.numbers] = np.arange(len(measured.numbers))
    return Lengths(
        first[representative],
        measured.counts[representative],
        measured.tokens,
        measured.patches,
        len(measured.numbers),
        measured.num_dropped,
        measured.num_truncated,
        measured.num_shrunk,
    )


def _nearest(known: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each of `targets`, the index of the nearest value in `known`. If several known values equal a target, they
    are used in turn, so that many records of one size do not all copy the same measured record.
    """
    order = np.argsort(known, kind="stable")
    values = known[order]
    first_equal, behind_equal = np.searchsorted(values, targets, "left"), np.searchsorted(values, targets, "right")
    turn = first_equal + np.arange(len(targets)) % np.maximum(behind_equal - first_equal, 1)
    below, above = np.maximum(first_equal - 1, 0), np.minimum(first_equal, len(values) - 1)
    nearer = np.where(targets - values[below] <= values[above] - targets, below, above)
    return order[np.where(behind_equal > first_equal, turn, nearer)]


def _cache_file(dataset: Dataset, numbers: np.ndarray, depends_on: dict[str, Any]) -> Path:
    # Of a file its content counts: its size and time may be those of another content (`cp -p`, an archive in which all
    # times are equal). Its path counts since pictures are found beside it.
    files = [
        [source.spec.type, str(data.path.resolve()), data.digest, len(data)]
        for source in dataset.sources
        for data in source.files
    ]
    everything = [_FORMAT, __version__, files, depends_on, len(numbers)]
    digest = hashlib.sha256(json.dumps(everything, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "lengths" / f"{digest[:32]}.npz"


def _read(file: Path, numbers: np.ndarray) -> _Measured | None:
    """The cached measurement; None if there is none that can be used."""
    try:
        with open_regular(file, DataError) as opened, np.load(opened, allow_pickle=False) as archive:
            counts, tokens, patches, totals = (archive[name] for name in ("counts", "tokens", "patches", "totals"))
    except FileNotFoundError:
        return None
    except DataError as error:
        log.warning(f"cached lengths are not used, measuring again: {error}")
        return None
    except Exception as error:  # zipfile, numpy and the system raise different errors for a broken file
        log.warning(f"{file}: cached lengths cannot be read ({error}); measuring again")
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
            f"data: measured lengths cannot be cached in {file.parent} ({error.strerror}); the next run measures again"
        )


def _remove_oldest(files: Sequence[Path]) -> None:
    for path in files[:-_KEPT_FILES]:
        path.unlink(missing_ok=True)
