"""Data files opened as numbered records that are read when they are asked for.

.jsonl and .txt hold one JSON object a line (blank lines are passed over), .json a list of objects (or, if it does not
begin with "[", the same as .jsonl), .csv a header line and one record a row. Of these only the place of each record is
kept in memory, 16 bytes a record. A .json list or .csv file that breaks off within its own syntax is always an error,
since what follows cannot be told apart; a single wrong record is the caller's to judge. .parquet (extra `parquet`) is
held in memory in Arrow's form.
"""

import csv
import hashlib
import io
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.utils.errors import DataError

EXTENSIONS = (".json", ".jsonl", ".txt", ".csv", ".parquet")
# what Hub data sets keep beside their data
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# csv columns whose cells are JSON
_JSON_CELLS = ("messages", "conversations", "history", "tools", "label", "is_system")
_MAX_OPEN = 32
_DIGEST_BYTES = 8
_BOM = b"\xef\xbb\xbf"

Raw = bytes | dict[str, Any]  # a record as it is sent to whoever parses it: JSON text, or already an object


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The data files at `path`, itself a file or a directory searched to its depth in sorted order, and the files there
    that are not data.
    """
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise DataError(
                f"{path}: a data file ends in {', '.join(EXTENSIONS)}. Hint: rename it after what it holds."
            )
        return [path], []
    everything = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
    ]
    data = [p for p in everything if p.suffix.lower() in EXTENSIONS and p.name not in _DESCRIPTIONS]
    if not data:
        raise DataError(f"{path}: no data file in this directory. Hint: a data file ends in {', '.join(EXTENSIONS)}.")
    return data, [p for p in everything if p not in data]


def load_record(raw: Raw, where: str) -> Any:
    """The object that a raw record holds; DataError "file:line: ..." if it is not JSON."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start} of the line). Hint: save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        start = raw[:40].decode("utf-8", "replace").strip()
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno} of a line that begins {start!r}. "
            "Hint: one JSON object per line."
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply. Hint: flatten the record.") from None


class DataFile:
    """The valid records of one file. `raw(i)` reads one; `where(i)` is its "file:line" (for parquet "file:row").
    `digest` is a hash of all of them in their order, whatever the file is called.
    """

    digest: str

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        raise NotImplementedError

    def raw(self, i: int) -> Raw:
        raise NotImplementedError

    def where(self, i: int) -> str:
        raise NotImplementedError


class _TextFile(DataFile):
    """A file of which byte spans are records: starts int64 [N], sizes and lines uint32 [N]."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._starts, self._sizes, self._lines = array("q"), array("I"), array("I")
        self._bytes = path.stat().st_size

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        """Index the records that `check` lets pass; what it raises goes to `on_bad`."""
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for start, line, raw in self._spans():
            try:
                check(self._decode(raw, line), f"{self.path}:{line}")
            except DataError as error:
                on_bad(error)
                continue
            self._starts.append(start)
            self._sizes.append(len(raw))
            self._lines.append(line)
            state.update(len(raw.rstrip()).to_bytes(8, "little") + raw.rstrip())
        state.update(self._meaning())
        self.digest = state.hexdigest()

    def _meaning(self) -> bytes:
        """What the records' bytes mean depends on this, too."""
        return b""

    def _spans(self) -> Iterator[tuple[int, int, bytes]]:
        """(byte offset, line number, bytes) of each record."""
        with open(self.path, "rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                skip = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
                if line[skip:].strip():
                    yield start + skip, number, line[skip:]
                start += len(line)

    def _decode(self, raw: bytes, line: int) -> Raw:
        return raw

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, i: int) -> Raw:
        return self._decode(_handles.read(self, self._starts[i], self._sizes[i]), self._lines[i])

    def open(self) -> io.BufferedReader:
        """Open the file for reading its records; DataError if it is not what was scanned."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - _Handles keeps it open across calls
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {error.strerror}. Hint: do not move data files during a run."
            ) from None
        if self.path.stat().st_size != self._bytes:
            file.close()
            raise DataError(f"{self.path}: changed since the run began. Hint: do not change data files during a run.")
        return file

    def where(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"


class _JsonFile(_TextFile):
    """A list of objects. Latin-1 maps bytes to characters one to one, so that the places the JSON parser reports are
    byte offsets.
    """

    def _spans(self) -> Iterator[tuple[int, int, bytes]]:
        data = self.path.read_bytes()
        at = len(_BOM) if data.startswith(_BOM) else 0
        if data[at:].lstrip()[:1] != b"[":
            yield from super()._spans()
            return
        text, decoder = data.decode("latin-1"), json.JSONDecoder()
        line, counted = 1, 0
        at = _skip_space(text, text.index("[") + 1)
        closed = text[at : at + 1] == "]"
        at += closed  # an empty list ends right there
        while not closed:
            line, counted = line + text.count("\n", counted, at), at
            try:
                _, end = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                place, why = (
                    (error.lineno, error.msg)
                    if isinstance(error, json.JSONDecodeError)
                    else (line, "nested too deeply")
                )
                raise DataError(
                    f"{self.path}:{place}: the list cannot be read as JSON: {why}. "
                    "Hint: mend it, or write one object per line (.jsonl)."
                ) from None
            yield at, line, data[at:end]
            at = _skip_space(text, end)
            mark = text[at : at + 1]
            if mark not in (",", "]"):
                where = f"{self.path}:{1 + text.count(chr(10), 0, at)}"
                raise DataError(
                    f"{where}: expected ',' or ']' after a record, found {mark or 'the end of the file'!r}. "
                    "Hint: is the file complete?"
                )
            closed = mark == "]"
            at = _skip_space(text, at + 1)
        if text[at:].strip():
            raise DataError(f"{self.path}: text after the end of the JSON list. Hint: one list per file.")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


class _CsvFile(_TextFile):
    """A header row, then records that may span lines inside quotes. An empty cell is an absent field; the columns of
    _JSON_CELLS hold JSON.
    """

    _header: list[str]

    def _spans(self) -> Iterator[tuple[int, int, bytes]]:
        csv.field_size_limit(2**31 - 1)
        with open(self.path, "rb") as file:
            taken: list[bytes] = []

            def lines() -> Iterator[str]:
                for line in file:
                    taken.append(line)
                    yield line.decode("utf-8", "surrogateescape")

            reader, start, line = csv.reader(lines(), strict=True), 0, 1
            self._header = []
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise DataError(
                        f"{self.path}:{line}: not CSV: {error}. Hint: check the quotes of this record."
                    ) from None
                raw = b"".join(taken)
                if not self._header:
                    self._header = self._check_header(row)
                elif row:
                    yield start, line, raw
                start, line = start + len(raw), line + len(taken)
                taken.clear()

    def _meaning(self) -> bytes:
        return json.dumps(self._header).encode()

    def _check_header(self, row: list[str]) -> list[str]:
        header = [name.strip().lstrip("\ufeff") for name in row]
        if not all(header) or len(set(header)) != len(header):
            raise DataError(
                f"{self.path}:1: the header has an empty or repeated column name: {header}. "
                "Hint: the first row names the fields."
            )
        return header

    def _decode(self, raw: bytes, line: int) -> Raw:
        where = f"{self.path}:{line}"
        try:
            row = next(csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True))
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8 text. Hint: save the file as UTF-8.") from None
        if len(row) != len(self._header):
            raise DataError(
                f"{where}: {len(row)} cells for {len(self._header)} columns. "
                "Hint: quote cells that hold commas or line breaks."
            )
        record: dict[str, Any] = {name: cell for name, cell in zip(self._header, row, strict=True) if cell != ""}
        for name in _JSON_CELLS:
            if name in record:
                try:
                    record[name] = json.loads(record[name])
                except ValueError:
                    raise DataError(
                        f"{where}: the cell of column {name!r} must hold JSON. Hint: write the list as JSON text."
                    ) from None
        return record


class _ParquetFile(DataFile):
    def __init__(self, path: Path):
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{path}: reading parquet needs pyarrow. "
                "Hint: pip install 'erniekit[parquet]', or convert the file to .jsonl."
            ) from None
        try:
            self._table = pyarrow.parquet.ParquetFile(path).read()
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: cannot be read as parquet: {error}. Hint: is the file complete?") from None
        self._rows = np.arange(self._table.num_rows)

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        good = []
        for i in range(len(self._rows)):
            try:
                check(self.raw(i), self.where(i))
                good.append(i)
            except DataError as error:
                on_bad(error)
        self._rows = np.array(good, np.int64)
        with open(self.path, "rb") as file:
            state = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
        state.update(self._rows.tobytes())
        self.digest = state.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, i: int) -> Raw:
        return _without_null(self._table.slice(int(self._rows[i]), 1).to_pylist()[0])

    def where(self, i: int) -> str:
        return f"{self.path}:{self._rows[i] + 1}"


def _without_null(value: Any) -> Any:
    """Drop the nulls with which Arrow fills the fields that only other records have."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def open_file(path: Path, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> DataFile:
    """Open a file by its extension and pass every record through `check`; the DataError of a bad one goes to `on_bad`,
    which may raise it.
    """
    kinds: dict[str, type[_TextFile] | type[_ParquetFile]] = {
        ".json": _JsonFile,
        ".csv": _CsvFile,
        ".parquet": _ParquetFile,
    }
    try:
        file = kinds.get(path.suffix.lower(), _TextFile)(path)
        file.scan(check, on_bad)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}. Hint: check the path and its permissions."
        ) from None
    return file


class _Handles:
    """The most recently read files, kept open and shared by all threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[_TextFile, io.BufferedReader] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: _TextFile, start: int, size: int) -> bytes:
        with self._lock:
            file = self._open.pop(source, None) or source.open()
            self._open[source] = file
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise DataError(
                f"{source.path}: became shorter while it was being read. Hint: do not change data files during a run."
            )
        return data


_handles = _Handles()
