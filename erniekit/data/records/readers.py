"""Opens data files as numbered records that are read on demand.

A .jsonl or .txt file has one JSON object per line (blank lines are ignored), a .json file a list of objects (each form
is also recognised under the other's name), a .csv file a header line and one record per row. Only the position of each
record is kept in memory, 16 bytes per record. A syntax error of the .json list or .csv file itself is always an error,
since the records after it cannot be separated; the caller decides about a single wrong record. A .parquet file (extra
`parquet`) is kept in memory in Arrow's form.
"""

import csv
import hashlib
import io
import json
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.data.records.data_file import DIGEST_BYTES, DataFile, Raw
from erniekit.data.records.errors import BadLine, reading
from erniekit.data.records.find_files import FORM_BYTES, check_form, check_regular
from erniekit.data.records.parquet import ParquetFile
from erniekit.utils.errors import DataError
from erniekit.utils.user_files import parse_json
from erniekit.utils.wording import count_of

# csv columns whose cells contain JSON
_JSON_CELLS = ("messages", "conversations", "history", "tools", "label", "is_system", "response", "sort", "kto_tag")
# those of them that hold a truth value, which tables also write as True or TRUE
_TRUTHS = ("label", "kto_tag")
# csv columns whose cells contain text, or messages as JSON
_TEXT_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected", "chosen_response", "rejected_response")
_MAX_OPEN = 32
_BOM = b"\xef\xbb\xbf"


def load_record(raw: Raw, where: str) -> Any:
    """Parses a raw record. Raises DataError "file:line: ..." if it is not JSON, or is JSON whose problems Python's
    parser ignores silently (see user_files.parse_json).
    """
    if not isinstance(raw, bytes):
        return raw
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line). Hint: save the file as UTF-8."
        ) from None
    try:
        return parse_json(text, where, BadLine)
    except BadLine as error:
        if "not JSON" not in str(error):
            raise BadLine(f"{error} Hint: fix or remove this record.") from None
        raise BadLine(
            f"{str(error).removesuffix('.')} of a line that begins {text[:40].strip()!r}. "
            "Hint: one JSON object per line."
        ) from None


class _TextFile(DataFile):
    """A file whose records are byte spans: starts int64 [N], sizes and lines uint32 [N]."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._starts, self._sizes, self._lines = array("q"), array("I"), array("I")
        self._bytes = path.stat().st_size

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        """Index the records that `check` accepts; pass the BadLine of any other record to `on_bad`."""
        self._check_form()
        state = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for start, line, raw in self._spans():
            where = f"{self.path}:{line}"
            try:
                with reading(where):
                    check(self._decode(raw, line), where)
            except BadLine as error:
                on_bad(error)
                continue
            self._starts.append(start)
            self._sizes.append(len(raw))
            self._lines.append(line)
            content = raw.rstrip()
            state.update(len(content).to_bytes(8, "little"))
            state.update(content)
        if self.path.stat().st_size != self._bytes:
            raise self._changed()
        state.update(self._meaning())
        self.digest = state.hexdigest()

    def _meaning(self) -> bytes:
        """Further bytes that the meaning of the records depends on; they enter the digest."""
        return b""

    def _check_form(self) -> None:
        with open(self.path, "rb") as file:
            check_form(self.path, file.read(FORM_BYTES))

    def _changed(self) -> DataError:
        return DataError(f"{self.path}: changed since the run began. Hint: do not change data files during a run.")

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
        """Open the file for reading its records."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - _Handles keeps it open across calls
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read any more: {error.strerror}. Hint: do not move data files during a run."
            ) from None
        return file

    def check_size(self, file: io.BufferedReader) -> None:
        """Raise DataError if the size of the file has changed since it was scanned."""
        if os.fstat(file.fileno()).st_size != self._bytes:
            raise self._changed()

    def where(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"

    def record_bytes(self) -> np.ndarray:
        return np.array(self._sizes, np.int64)


class _JsonFile(_TextFile):
    """A list of objects. It is decoded as Latin-1, which maps bytes to characters one to one, so that the positions
    that the JSON parser reports are byte offsets.
    """

    def _spans(self) -> Iterator[tuple[int, int, bytes]]:
        data = self.path.read_bytes()
        at = len(_BOM) if data.startswith(_BOM) else 0
        if data[at:].lstrip()[:1] != b"[":
            if data[at:].lstrip().partition(b"\n")[0].strip() == b"{":
                raise DataError(
                    f"{self.path}: begins with a JSON object that spans several lines. "
                    "Hint: write the records as one list, [...], or each on a line of its own."
                )
            yield from super()._spans()
            return
        # numbers are not converted here: one that is too long is an error of its record, not of the list
        text, decoder = data.decode("latin-1"), json.JSONDecoder(parse_int=float, parse_float=float)
        line, counted = 1, 0
        at = _skip_space(text, text.index("[") + 1)
        closed = text[at : at + 1] == "]"
        at += closed  # an empty list ends here
        while not closed:
            line, counted = line + text.count("\n", counted, at), at
            try:
                _, end = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                line_number, reason = line, "nested too deeply"
                if isinstance(error, json.JSONDecodeError):
                    line_number, reason = error.lineno, error.msg
                raise DataError(
                    f"{self.path}:{line_number}: the list cannot be read as JSON: {reason}. "
                    "Hint: fix it, or write one object per line (.jsonl)."
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
    """A header row and records, which may span several lines inside quotes. An empty cell is an absent field; the
    columns of _JSON_CELLS contain JSON. If names in the header follow a space, no cell begins with spaces.
    """

    _header: list[str]
    _is_spaced: bool  # a space follows the commas

    def _spans(self) -> Iterator[tuple[int, int, bytes]]:
        csv.field_size_limit(2**31 - 1)
        with open(self.path, "rb") as file:
            taken: list[bytes] = []

            def lines() -> Iterator[str]:
                for number, line in enumerate(file):
                    taken.append(line)
                    text = line if number else line.removeprefix(_BOM)  # a quote must be the first character of a cell
                    yield text.decode("utf-8", "surrogateescape")

            records = lines()
            reader, start, line = csv.reader(records, strict=True), 0, 1
            self._header, self._is_spaced = [], False
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
                    self._is_spaced = any(name[:1] == " " for name in row)
                    reader = csv.reader(records, strict=True, skipinitialspace=self._is_spaced)
                elif any(row):  # a spreadsheet exports empty rows as rows of empty cells
                    yield start, line, raw
                start, line = start + len(raw), line + len(taken)
                taken.clear()

    def _meaning(self) -> bytes:
        return json.dumps([*self._header, " "] if self._is_spaced else self._header).encode()

    def _check_header(self, row: list[str]) -> list[str]:
        header = [name.strip() for name in row]
        separator = next((mark for mark in ";\t|" if mark in header[0]), None)
        if len(header) == 1 and separator:
            raise DataError(
                f"{self.path}:1: the header is a single column, {header[0]!r}. "
                f"Hint: separate the cells with commas, not with {separator!r}."
            )
        if not all(header) or len(set(header)) != len(header):
            raise DataError(
                f"{self.path}:1: the header has an empty or repeated column name: {header}. "
                "Hint: the first row names the fields; delete empty columns."
            )
        return header

    def _decode(self, raw: bytes, line: int) -> Raw:
        where = f"{self.path}:{line}"
        try:
            lines = io.StringIO(raw.decode("utf-8"), newline="\n")
            row = next(csv.reader(lines, strict=True, skipinitialspace=self._is_spaced))
        except UnicodeDecodeError:
            raise BadLine(f"{where}: not UTF-8 text. Hint: save the file as UTF-8.") from None
        except (csv.Error, StopIteration) as error:
            raise BadLine(f"{where}: not CSV: {error}. Hint: check the quotes of this record.") from None
        if len(row) != len(self._header):
            raise BadLine(
                f"{where}: {count_of(len(row), 'cell')} for {count_of(len(self._header), 'column')}. "
                "Hint: quote cells that hold commas or line breaks."
            )
        record: dict[str, Any] = {name: cell for name, cell in zip(self._header, row, strict=True) if cell != ""}
        for name in _JSON_CELLS:
            if name in record:
                text = record[name]
                if name in _TRUTHS and text.lower() in ("true", "false"):  # True in Python's tables, TRUE in Excel's
                    text = text.lower()
                description = f"{where}: the cell of column {name!r} must hold JSON"
                try:
                    record[name] = parse_json(text, description, BadLine)
                except BadLine as error:
                    raise BadLine(f"{error} Hint: write the value as JSON text.") from None
        return record | _lists_of(record)


def _lists_of(record: dict[str, Any]) -> dict[str, Any]:
    """The cells of a csv record that are lists in JSON, in columns that may hold text as well: messages, and the turns
    of `src` and `tgt` where both are lists of texts.
    """
    lists = {name: _list_in(record.get(name)) for name in (*_TEXT_OR_MESSAGES, "src", "tgt")}
    turns = [lists.pop(name) for name in ("src", "tgt")]
    messages = {
        name: value
        for name, value in lists.items()
        if value and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    }
    if all(value is not None and all(isinstance(text, str) for text in value) for value in turns) and turns[0]:
        return messages | dict(zip(("src", "tgt"), turns, strict=True))
    return messages


def _list_in(cell: Any) -> list[Any] | None:
    """The list that a cell holds as JSON; None for any other text."""
    if not isinstance(cell, str) or cell[:1] != "[":
        return None
    try:
        value = parse_json(cell, "cell", BadLine)
    except BadLine:
        return None
    return value if isinstance(value, list) else None


def open_file(path: Path, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> DataFile:
    """Open a file according to its extension and pass every record to `check`. The DataError of a bad record is passed
    to `on_bad`, which may raise it.
    """
    kinds: dict[str, type[_TextFile] | type[ParquetFile]] = {
        ".json": _JsonFile,
        ".csv": _CsvFile,
        ".parquet": ParquetFile,
    }
    check_regular(path)
    try:
        kind = kinds.get(path.suffix.lower(), _TextFile)
        file = (_JsonFile if kind is _TextFile and _is_list_of_objects(path) else kind)(path)
        file.scan(check, on_bad)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}. Hint: check the path and its permissions."
        ) from None
    return file


def _is_list_of_objects(path: Path) -> bool:
    """Whether a file begins with "[" and "{", as a JSON list does. ERNIEKit's own demo data is such a list in a file
    named .jsonl.
    """
    with open(path, "rb") as file:
        begin = file.read(4096).removeprefix(_BOM)
    return b"".join(begin.split())[:2] == b"[{"


class _Handles:
    """The most recently read files, kept open and shared by all threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[_TextFile, io.BufferedReader] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: _TextFile, start: int, size: int) -> bytes:
        with self._lock:
            file = self._open.pop(source, None) or source.open()
            self._open[source] = file
            source.check_size(file)
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            source.check_size(file)
        return data


_handles = _Handles()
