"""Streaming reader of safetensors files: one tensor at a time, by seek and read, never a whole shard.

The kernel reads ahead by itself: asking it to (posix_fadvise) made resuming slower (docs/speed.md).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import STORAGE, num_bytes, to_fp32
from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    TensorInfo,
    bytes_of,
    read_header,
    read_index,
    unusable_weights,
)
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.wording import count_of


class Reader:
    """The tensors of one file, or of a directory with `model.safetensors` or an index and its shards.

    All headers are read and compared with the file sizes at once, so that a truncated download is noticed at the start.
    `u16_is_bf16`: older Paddle files store bfloat16 as plain 16-bit integers; their type is then BF16. A
    CheckpointError names the file, what is wrong, and what to do.
    """

    def __init__(self, path: str | Path, u16_is_bf16: bool = False) -> None:
        self.path = Path(path)
        self._entries: dict[str, Entry] = {}
        self._alias = {"U16": "BF16"} if u16_is_bf16 else {}
        self.metadata: dict[str, str] = {}  # the metadata of the header; for several files, of the first one
        if self.path.is_dir():
            self._open_directory()
        elif not self.path.exists():
            raise CheckpointError(f"{self.path} does not exist. Check the path of the model.")
        else:
            self._entries, self.metadata = read_header(self.path)

    def _open_directory(self) -> None:
        index, single = self.path / INDEX_FILE, self.path / SINGLE_FILE
        if not index.is_file():
            if single.is_file():
                self._entries, self.metadata = read_header(single)
                return
            raise CheckpointError(
                unusable_weights(self.path)
                or f"no weights in {self.path}: expected {SINGLE_FILE} or {INDEX_FILE}. Check the path."
            )
        weight_map = read_index(index)
        if single.is_file() and set(weight_map.values()) != {SINGLE_FILE}:
            raise CheckpointError(
                f"{self.path} holds both {SINGLE_FILE} and {INDEX_FILE} of other files; one of them is stale. "
                "Remove the one that does not belong to this model."
            )
        self._open_shards(index, weight_map)

    def _open_shards(self, index: Path, weight_map: Mapping[str, str]) -> None:
        read = {name: read_header(self.path / name) for name in sorted(set(weight_map.values()))}
        headers = {name: entries for name, (entries, _) in read.items()}
        self.metadata = next(metadata for _, metadata in read.values())
        absent = [f"{name} (in {file})" for name, file in weight_map.items() if name not in headers[file]]
        if absent:
            raise CheckpointError(
                f"{index} names {count_of(len(absent), 'tensor')} that the named files do not hold: {listed(absent)}. "
                "The index and the shards are of different models: copy the model again."
            )
        self._entries = {name: headers[file][name] for name, file in weight_map.items()}
        unlisted = [name for header in headers.values() for name in header if name not in weight_map]
        if unlisted:
            log.warning(
                f"{count_of(len(unlisted), 'tensor is', 'tensors are')} in the shards but not in {index}, and left "
                f"out: {listed(unlisted)}"
            )
        _name_repeated(index, weight_map, headers.values())

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        """(header dtype, shape) of a tensor; nothing is read."""
        info = self._entry(name).info
        return TensorInfo(self._alias.get(info.dtype, info.dtype), info.shape)

    def read(self, name: str, as_fp32: bool = False, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads a tensor, or `rows` [begin, end) of its first axis; bfloat16 as its uint16 bits. `as_fp32` widens
        floating types to float32.
        """
        entry = self._entry(name)
        begin, shape = 0, entry.info.shape
        if rows is not None:
            assert 0 <= rows[0] <= rows[1] <= shape[0], (name, shape, rows)
            begin, shape = rows[0] * num_bytes(entry.info.dtype, shape[1:]), (rows[1] - rows[0], *shape[1:])
        out = np.empty(shape, STORAGE[entry.info.dtype])
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + begin)
            _read_exactly(file, bytes_of(out), entry.file)
        if not as_fp32:
            return out
        try:
            return to_fp32(out, self.info(name).dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{entry.file}: {name}: {error}") from None

    @contextmanager
    def rows_from(self, name: str, begin: int = 0) -> Iterator[Callable[[np.ndarray], None]]:
        """A function that reads the next rows of a tensor, from row `begin` of its first axis on, into a contiguous
        array of the storage type: for a tensor in parts that stay in a processor's cache.
        """
        entry = self._entry(name)
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + begin * num_bytes(entry.info.dtype, entry.info.shape[1:]))

            def fill(target: np.ndarray) -> None:
                assert target.dtype == STORAGE[entry.info.dtype] and target.shape[1:] == entry.info.shape[1:], name
                _read_exactly(file, bytes_of(target), entry.file)

            yield fill

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}.")
        return self._entries[name]


def _name_repeated(index: Path, weight_map: Mapping[str, str], headers: Iterable[Mapping[str, Entry]]) -> None:
    count = Counter(name for header in headers for name in header)
    repeated = [f"{name} (read from {file})" for name, file in weight_map.items() if count[name] > 1]
    if repeated:
        log.once(
            f"{count_of(len(repeated), 'tensor is', 'tensors are')} in several shards of {index}, which need not hold "
            f"the same values; what the shard that the index names holds is read: {listed(repeated)}"
        )


def _read_exactly(file: Any, target: memoryview, path: Path) -> None:
    num_read = 0
    while num_read < len(target):
        count = file.readinto(target[num_read:])
        if not count:
            raise CheckpointError(f"{path} ended while it was read; it was changed or truncated. Copy the file again.")
        num_read += count
