"""Reads parquet files (extra `parquet`) into memory in Arrow's form."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.data.records.data_file import DIGEST_BYTES, DataFile, Raw
from erniekit.data.records.errors import BadLine, reading
from erniekit.data.records.find_files import FORM_BYTES, check_form
from erniekit.utils.errors import DataError

_BLOCK_BYTES = 1 << 20  # bytes of the file that are hashed at a time


class ParquetFile(DataFile):
    """The rows of a file as objects. A null is an absent field, and a map becomes an object. Values that JSON lacks
    (dates, bytes, decimals) are left unchanged; a format that reads such a field refuses it.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{path}: reading parquet needs pyarrow. "
                "Hint: pip install 'erniekit[parquet]', or convert the file to .jsonl."
            ) from None
        try:
            self._table = pyarrow.parquet.ParquetFile(path).read()
        except Exception as error:  # pyarrow may raise any exception for a damaged file
            self._check_form()
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            raise DataError(f"{path}: cannot be read as parquet: {reason}. Hint: is the file complete?") from None
        names = self._table.column_names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: two columns are called {twice!r}. Hint: remove or rename one of them.")
        self._rows = np.arange(self._table.num_rows)

    def _check_form(self) -> None:
        """Raise DataError for a file that does not even begin as parquet does."""
        with open(self.path, "rb") as file:
            begin = file.read(FORM_BYTES)
        if not begin.startswith(b"PAR1"):
            check_form(self.path, begin)

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        """See DataFile.scan."""
        good = []
        for i in range(len(self._rows)):
            where = self.where(i)
            try:
                with reading(where):
                    check(self.raw(i), where)
                good.append(i)
            except BadLine as error:
                on_bad(error)
        self._rows = np.array(good, np.int64)
        state = hashlib.blake2b(digest_size=DIGEST_BYTES)
        with open(self.path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                state.update(block)
        state.update(self._rows.tobytes())
        self.digest = state.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, i: int) -> Raw:
        """Row i as an object."""
        row = int(self._rows[i])
        record = {}
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            try:
                value = _as_json(column[row].as_py(), column.type)
            except Exception as error:  # as above
                value = UnreadableValue(error)
            if value is not None:
                record[name] = value
        return record

    def where(self, i: int) -> str:
        """ "file:row", counted from 1."""
        return f"{self.path}:{self._rows[i] + 1}"

    def record_bytes(self) -> np.ndarray:
        """The file's mean for every row, since Arrow stores columns and not rows."""
        return np.full(len(self), self._table.nbytes // max(self._table.num_rows, 1), np.int64)


class UnreadableValue:
    """A placeholder for a value that Arrow cannot convert to Python: text that is not UTF-8, a date out of range. Such
    a value is an error only if its field is read.
    """

    def __init__(self, error: Exception):
        self.reason = str(error)[:100]

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self.reason})"


def _as_json(value: Any, kind: Any) -> Any:
    """The value with maps as objects and without nulls, which Arrow adds for fields that only other records have;
    `kind` is its Arrow type.
    """
    import pyarrow

    if isinstance(value, dict):
        inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return {key: _as_json(item, inner[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        if pyarrow.types.is_map(kind):
            entries = {str(key): _as_json(item, kind.item_type) for key, item in value if item is not None}
            if len({str(key) for key, _ in value}) < len(value):
                raise ValueError("a map has a key twice")
            return entries
        return [_as_json(item, kind.value_type) for item in value]
    return value
