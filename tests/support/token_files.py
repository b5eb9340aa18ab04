"""Token files for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from erniekit.data.tokens.files import TokenWriter


def write_token_files(prefix: Path, documents: Iterable[np.ndarray], dtype: str) -> None:
    """Write documents, each ids [n], as prefix.bin and prefix.idx."""
    writer = TokenWriter(prefix, dtype)
    for ids in documents:
        writer.add(ids)
    writer.finish()
