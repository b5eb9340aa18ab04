"""Streaming writer of safetensors files: one tensor at a time, in the order of a plan. Files are written atomically."""

import json
import math
import os
import re
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import STORAGE, num_bytes
from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE, WEIGHT_FILE, Plan, bytes_of
from erniekit.config.values import BYTES_OF
from erniekit.utils import atomic
from erniekit.utils.errors import CheckpointError, disk_is_full

_HEADER_ALIGNMENT = 8
_SYNC_BYTES = 1 << 26


def parse_size(size: int | str) -> int:
    """Bytes of `"5GB"`, `"500MB"`, `"2GiB"` (powers of 1000; with an i, of 1024), or of a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = (match.group(2).upper() or "B") if match else None
    number = float(match.group(1)) * BYTES_OF[unit] if match and unit in BYTES_OF else 0.0
    if not 1 <= number < math.inf:
        raise CheckpointError(f"max_shard_size {size!r}: expected a size such as 5GB or 500MB.")
    return round(number)


class Writer:
    """Writes tensors one by one, in the order of a plan that names every tensor's type and shape beforehand.

    `with Writer(dir, plan) as writer: writer.write(name, array) ...`. Files are `model-0000i-of-0000N.safetensors` and
    an index, or one `model.safetensors`; a tensor larger than `max_shard_size` has a shard of its own. They have
    temporary names until all are complete and on disk. On an error they are removed, and earlier files are
    unchanged.

    A tensor may come in parts (`append`). Every _SYNC_BYTES the system is asked to begin writing them to the disk, in
    another thread, so that the disk works while the next tensors are computed.

    With `numbered` (files of the writers before, files of all writers) these are some of the files of a model that
    several processes write into one new directory; the process that has all weight maps adds the index (`write_index`).
    """

    def __init__(
        self,
        directory: str | Path,
        plan: Plan,
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
        numbered: tuple[int, int] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._metadata = dict(metadata) if metadata is not None else {"format": "pt"}
        self._shards = plan_shards(plan, max_shard_size)
        self._whole = numbered is None
        before, total = numbered or (0, len(self._shards))
        self._names = [SINGLE_FILE]
        if total > 1:
            self._names = [f"model-{before + i + 1:05d}-of-{total:05d}.safetensors" for i in range(len(self._shards))]
        self._queue = [(i, *tensor) for i, shard in enumerate(self._shards) for tensor in shard]
        self.num_bytes = sum(num_bytes(dtype, shape) for _, dtype, shape in plan)
        self._next = 0
        self._part_bytes = 0  # of the next tensor, written
        self._file: FileIO | None = None
        self._sync: Thread | None = None
        self._sync_error: OSError | None = None
        self._unsynced = 0
        self._open_shard = -1
        self._finished = False
        if len({name for name, _, _ in plan}) < len(plan):
            raise CheckpointError("a tensor name occurs twice in the plan of what to write.")
        self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def files(self) -> list[str]:
        """The names of the weight files, in order (without the index)."""
        return list(self._names)

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor."""
        return {name: self._names[shard] for shard, name, _, _ in self._queue}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def next_name(self) -> str | None:
        """The tensor that comes next, or whose next part does; None after the last one."""
        return self._queue[self._next][1] if self._next < len(self._queue) else None

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the plan's next tensor. `array` has its shape and the storage type of its dtype (uint16 for BF16)."""
        assert self._next < len(self._queue), f"{name} comes after the end of the plan"
        shape = self._queue[self._next][3]
        assert array.shape == shape, (name, array.shape, shape)
        self.append(name, array)

    def append(self, name: str, part: np.ndarray) -> None:
        """Write the next rows, along the first axis, of the plan's next tensor, which is complete with its last row."""
        assert self._next < len(self._queue), f"{name} comes after the end of the plan"
        shard, expected, dtype, shape = self._queue[self._next]
        assert name == expected, f"the plan says {expected}, not {name}"
        fits = part.shape[1:] == shape[1:] and part.dtype == STORAGE[dtype]
        self._part_bytes += part.nbytes
        assert fits and self._part_bytes <= num_bytes(dtype, shape), (name, part.shape, part.dtype, shape, dtype)
        try:
            self._switch_to(shard)
            assert self._file is not None
            _write_all(self._file, bytes_of(np.ascontiguousarray(part)))
            self._sync_early(part.nbytes)
        except OSError as error:  # leaving the `with` block removes the files
            raise self._explain(error) from error
        if self._part_bytes == num_bytes(dtype, shape):
            self._next, self._part_bytes = self._next + 1, 0

    def close(self) -> None:
        """Sync all files to disk, then give them their names; the index, which makes them a model, comes last."""
        if self._finished:
            return
        if self._next < len(self._queue):
            self.abort()
            missing = [name for _, name, _, _ in self._queue[self._next :]]
            raise AssertionError(f"{len(missing)} planned tensors were not written: {listed(missing)}")
        try:
            for shard in range(max(self._open_shard, 0), len(self._shards)):
                self._switch_to(shard)  # finish the last file, or create those of a plan without tensors
            self._finish_file()
            ready = {name: self._temporary(name) for name in self._names}
            if not self._whole:
                for name, file in ready.items():
                    os.replace(file, self.directory / name)
            else:
                if len(self._shards) > 1:
                    ready[INDEX_FILE] = self._temporary(INDEX_FILE)
                    write_index(ready[INDEX_FILE], self.weight_map, self.num_bytes)
                replace_weights(self.directory, ready)
        except BaseException as error:  # also for an interrupt, so that no temporary file is left
            self.abort()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        self._finished = True

    def abort(self) -> None:
        """Remove the temporary files; earlier files of the directory stay."""
        if self._file is not None:
            self._wait_for_sync()
            try:
                self._file.close()
            except OSError:
                pass  # closing flushes nothing here, and a full disk must not hide the original error
            self._file = None
        if not self._finished:
            for name in [*self._names, INDEX_FILE]:
                self._temporary(name).unlink(missing_ok=True)
        self._finished = True

    def _temporary(self, name: str) -> Path:
        return self.directory / f".{name}.{os.getpid()}.tmp"

    def _switch_to(self, shard: int) -> None:
        while self._open_shard < shard:
            self._finish_file()
            self._open_shard += 1
            # Unbuffered: tensors are large, and no data may wait in a buffer when the disk turns out to be full.
            self._file = FileIO(self._temporary(self._names[self._open_shard]), "wb")
            _write_all(self._file, memoryview(_header_bytes(self._shards[self._open_shard], self._metadata)))

    def _finish_file(self) -> None:
        if self._file is not None:
            self._wait_for_sync()
            if self._sync_error is not None:
                raise self._sync_error
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _sync_early(self, num_bytes: int) -> None:
        """Begin to write the file to the disk, if enough is new and that is not being done."""
        self._unsynced += num_bytes
        if self._unsynced < _SYNC_BYTES or (self._sync is not None and self._sync.is_alive()):
            return
        self._wait_for_sync()
        self._unsynced = 0
        assert self._file is not None
        self._sync = Thread(target=self._sync_file, args=(self._file.fileno(),), name="erniekit-sync", daemon=True)
        self._sync.start()

    def _sync_file(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:  # the system reports it once; a later fsync may succeed
            self._sync_error = error

    def _wait_for_sync(self) -> None:
        if self._sync is not None:
            self._sync.join()
            self._sync = None

    def _explain(self, error: OSError) -> CheckpointError:
        return write_error(error, self.directory, self.num_bytes)


def write_index(path: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of several weight files, on disk when this returns."""
    content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(json.dumps(content, indent=2, sort_keys=True).encode()))
        os.fsync(file.fileno())


def write_error(error: OSError, directory: Path, needed: int | None = None) -> CheckpointError:
    """The error for a failed write; `needed` is the number of bytes that were to be written, if known."""
    if disk_is_full(error):
        size = f": these weights need {needed / 1e6:,.1f} MB" if needed else ""
        return CheckpointError(
            f"the disk of {directory} is full{size}. Free some space or choose another output directory; "
            "existing files have not been changed."
        )
    return CheckpointError(f"cannot write to {directory}: {error}.")


def replace_weights(directory: Path, ready: Mapping[str, Path]) -> None:
    """Rename complete weight files (final name -> where it is now, same file system) over those of `directory`.

    An old index is removed first and the new one comes last, so that shards of two models never look like one model;
    weight files that do not belong to the new model are removed.
    """
    (directory / INDEX_FILE).unlink(missing_ok=True)
    for name, file in ready.items():
        if name != INDEX_FILE:
            os.replace(file, directory / name)
    if INDEX_FILE in ready:
        (directory / SINGLE_FILE).unlink(missing_ok=True)
        os.replace(ready[INDEX_FILE], directory / INDEX_FILE)
    for file in list(directory.iterdir()):
        if WEIGHT_FILE.fullmatch(file.name) and file.name not in ready:
            file.unlink()
    atomic.sync_directory(directory)


def _write_all(file: Any, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += file.write(data[written : written + (1 << 30)])


def plan_shards(plan: Plan, max_shard_size: int | str) -> list[Plan]:
    """Split the plan into consecutive tensors for each file, at most `max_shard_size` of them; one file if there are
    none.
    """
    limit = parse_size(max_shard_size)
    shards: list[Plan] = [[]]
    size = 0
    for name, dtype, shape in plan:
        more = num_bytes(dtype, shape)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += more
    return shards


def _header_bytes(shard: Plan, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in shard:
        end = offset + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)  # so that tensors start aligned
    return len(text).to_bytes(8, "little") + text
