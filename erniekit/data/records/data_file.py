"""The interface of data files: numbered records, each with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.utils.errors import DataError

Raw = bytes | dict[str, Any]  # an unparsed record: JSON text, or an object
DIGEST_BYTES = 8


class DataFile:
    """The valid records of one file. `raw(i)` reads one; `where(i)` is its "file:line" (for parquet "file:row").
    `digest`, which scan() sets, is a hash of all records in order; the file's name does not enter it.
    """

    digest: str

    def __init__(self, path: Path):
        self.path = path

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        """Index the records that `check` accepts; pass the BadLine of any other record to `on_bad`."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def raw(self, i: int) -> Raw:
        raise NotImplementedError

    def where(self, i: int) -> str:
        raise NotImplementedError

    def record_bytes(self) -> np.ndarray:
        """The approximate size of each record in bytes, int64 [N]."""
        raise NotImplementedError
