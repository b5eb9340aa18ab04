"""What a data file is to its readers: numbered records, each with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.utils.errors import DataError

Raw = bytes | dict[str, Any]  # a record before it is parsed: JSON text, or an object
DIGEST_BYTES = 8


class DataFile:
    """The valid records of one file. `raw(i)` reads one; `where(i)` is its "file:line" (for parquet "file:row").
    `digest` is a hash of all of them in their order, whatever the file is called; scan() sets it.
    """

    digest: str

    def __init__(self, path: Path):
        self.path = path

    def scan(self, check: Callable[[Raw, str], None], on_bad: Callable[[DataError], None]) -> None:
        """Keep the records that `check` lets pass; the BadLine of another goes to `on_bad`."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def raw(self, i: int) -> Raw:
        raise NotImplementedError

    def where(self, i: int) -> str:
        raise NotImplementedError

    def record_bytes(self) -> np.ndarray:
        """About how long each record is, int64 [N]."""
        raise NotImplementedError
