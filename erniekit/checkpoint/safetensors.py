"""Streaming reader and writer of safetensors files: one tensor at a time, by seek and read, never a whole shard.

The format: see checkpoint.header. A model that needs more than one file has `model.safetensors.index.json` with
`{"weight_map": {name: file}}`.
"""

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import STORAGE, num_bytes, to_fp32
from erniekit.checkpoint.header import Entry, TensorInfo, read_header, read_index
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_HEADER_ALIGNMENT = 8
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS.update({"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40})

Plan = list[tuple[str, str, tuple[int, ...]]]


class Reader:
    """The tensors of one file, or of a directory with `model.safetensors` or an index and its shards.

    All headers are read and checked against the file sizes at once, so that a truncated download is found before an
    hour of work. `u16_is_bf16`: older Paddle files store bfloat16 as plain 16-bit integers; they are shown as BF16.
    Raises CheckpointError: file, what is wrong, what to do.
    """

    def __init__(self, path: str | Path, u16_is_bf16: bool = False) -> None:
        self.path = Path(path)
        self._entries: dict[str, Entry] = {}
        self._alias = {"U16": "BF16"} if u16_is_bf16 else {}
        self.metadata: dict[str, str] = {}  # the header's; of several files, the first one's
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
            shards = sorted(file.name for file in self.path.glob("model-*-of-*.safetensors"))
            if shards:
                raise CheckpointError(
                    f"{self.path} holds {len(shards)} weight shards but no {INDEX_FILE}: a download or a save was "
                    "interrupted. Copy the model again, or use an earlier checkpoint."
                )
            other = sorted(
                file.name for file in self.path.glob("*") if file.suffix in (".pdparams", ".bin", ".safetensors")
            )
            found = f" It has {', '.join(other[:3])}, which this toolkit does not read as a model." if other else ""
            raise CheckpointError(
                f"no weights in {self.path}: expected {SINGLE_FILE} or {INDEX_FILE}.{found} Check the path."
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
                f"{index} names {len(absent)} tensors that their files do not hold: {_some(absent)}. "
                "The index and the shards are of different models: copy the model again."
            )
        self._entries = {name: headers[file][name] for name, file in weight_map.items()}
        unlisted = [name for header in headers.values() for name in header if name not in weight_map]
        if unlisted:
            log.warning(
                f"{len(unlisted)} tensors are in the shards but not in {index}, and left out: {_some(unlisted)}"
            )

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        """(header dtype, shape) of a tensor; nothing is read."""
        info = self._entry(name).info
        return TensorInfo(self._alias.get(info.dtype, info.dtype), info.shape)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name).file

    def read(self, name: str, as_fp32: bool = False, rows: tuple[int, int] | None = None) -> np.ndarray:
        """One tensor, or `rows` [begin, end) of its first axis; bfloat16 as its uint16 bits. `as_fp32` widens floating
        types to float32.
        """
        entry = self._entry(name)
        begin, shape = 0, entry.info.shape
        if rows is not None:
            assert 0 <= rows[0] <= rows[1] <= shape[0], (name, shape, rows)
            begin, shape = rows[0] * num_bytes(entry.info.dtype, shape[1:]), (rows[1] - rows[0], *shape[1:])
        out = np.empty(shape, STORAGE[entry.info.dtype])
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + begin)
            _read_exactly(file, _bytes_of(out), entry.file)
        if not as_fp32:
            return out
        try:
            return to_fp32(out, self.info(name).dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{entry.file}: {name}: {error}") from None

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} holds no tensor {name}.")
        return self._entries[name]


def _some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_exactly(file: Any, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise CheckpointError(f"{path} ended while it was read; it was changed or truncated. Copy the file again.")
        done += count


def parse_size(size: int | str) -> int:
    """Bytes of `"5GB"`, `"500MB"`, `"2GiB"` (powers of 1000; with an i, of 1024), or of a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS or float(match.group(1)) * _UNITS[unit] < 1:
        raise CheckpointError(f"max_shard_size {size!r}: expected a size such as 5GB or 500MB.")
    return int(float(match.group(1)) * _UNITS[unit])


class Writer:
    """Writes tensors one by one, in the order of a plan that names every tensor's type and shape beforehand.

    `with Writer(dir, plan) as writer: writer.write(name, array) ...`. Files are `model-0000i-of-0000N.safetensors` and
    an index, or one `model.safetensors`; a tensor larger than `max_shard_size` has a shard of its own. They have
    temporary names until all are complete and on disk. On an error none of them stays, and what was there before is as
    it was.

    With `numbered` (files of the writers before, files of all writers) these are some of the files of a model that
    several processes write into one fresh directory; whoever has all weight maps adds the index (`write_index`).
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
        self._shards = cut_plan(plan, max_shard_size)
        self._whole = numbered is None
        before, total = numbered or (0, len(self._shards))
        self._names = [SINGLE_FILE]
        if total > 1:
            self._names = [f"model-{before + i + 1:05d}-of-{total:05d}.safetensors" for i in range(len(self._shards))]
        self._queue = [(i, *tensor) for i, shard in enumerate(self._shards) for tensor in shard]
        self.num_bytes = sum(num_bytes(dtype, shape) for _, dtype, shape in plan)
        self._next = 0
        self._file: FileIO | None = None
        self._open_shard = -1
        self._finished = False
        if len({name for name, _, _ in plan}) < len(plan):
            raise CheckpointError("a tensor name occurs twice in the plan of what to write.")
        self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def files(self) -> list[str]:
        """Names of the weight files, in order (without the index)."""
        return list(self._names)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor -> file."""
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

    def write(self, name: str, array: np.ndarray) -> None:
        """The plan's next tensor. `array` has its shape and the storage type of its dtype (uint16 bits for BF16)."""
        assert self._next < len(self._queue), f"{name} comes after the end of the plan"
        shard, expected, dtype, shape = self._queue[self._next]
        assert name == expected, f"the plan says {expected}, not {name}"
        assert array.shape == shape and array.dtype == STORAGE[dtype], (name, array.shape, array.dtype, shape, dtype)
        try:
            self._switch_to(shard)
            assert self._file is not None
            _write_all(self._file, _bytes_of(np.ascontiguousarray(array)))
        except OSError as error:  # leaving the `with` block removes the files
            raise self._explain(error) from error
        self._next += 1

    def close(self) -> None:
        """Bring all files to disk, then give them their names; the index, which makes them a model, comes last."""
        if self._finished:
            return
        if self._next < len(self._queue):
            self.abort()
            missing = [name for _, name, _, _ in self._queue[self._next :]]
            raise AssertionError(f"{len(missing)} planned tensors were not written: {_some(missing)}")
        try:
            for shard in range(max(self._open_shard, 0), len(self._shards)):
                self._switch_to(shard)  # the last, or shards of a plan without tensors
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
        except BaseException as error:  # an interrupt as well: no temporary file stays
            self.abort()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        self._finished = True

    def abort(self) -> None:
        """Remove the temporary files; what the directory held before stays."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # closing flushes nothing here, and a full disk must not hide the error that led to this
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
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _explain(self, error: OSError) -> CheckpointError:
        return write_error(error, self.directory, self.num_bytes)


def write_index(path: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    """The index of several weight files, on disk when this returns."""
    content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(json.dumps(content, indent=2, sort_keys=True).encode()))
        os.fsync(file.fileno())


def write_error(error: OSError, directory: Path, needed: int | None = None) -> CheckpointError:
    """What to tell of a failed write; `needed` is the number of bytes that were to be written, if known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = f": these weights need {needed / 1e6:,.1f} MB" if needed else ""
        return CheckpointError(
            f"the disk of {directory} is full{size}. Free some space or choose another output directory; "
            "what was there before has not been changed."
        )
    return CheckpointError(f"cannot write to {directory}: {error}.")


def replace_weights(directory: Path, ready: Mapping[str, Path]) -> None:
    """Rename complete weight files (final name -> where it is now, same file system) over those of `directory`.

    An old index goes first and the new one comes last, so that shards of two models never look like one model; weight
    files that do not belong to the new model go.
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
    sync_directory(directory)


def _write_all(file: Any, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done : done + (1 << 30)])


def cut_plan(plan: Plan, max_shard_size: int | str) -> list[Plan]:
    """Consecutive tensors of the plan for each file, at most `max_shard_size` of them; one file if there are none."""
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


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
