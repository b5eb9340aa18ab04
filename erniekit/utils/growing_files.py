"""Reads text and JSON lines that another process may still be writing, or has left broken: what cannot be read is
left out, and nothing raises.
"""

import codecs
import json
import math
from pathlib import Path
from typing import Any

from erniekit.utils.errors import UserError
from erniekit.utils.user_files import open_regular


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text holds, or None. NaN and infinity, which JSON lacks, become null."""
    try:
        content = json.loads(text, parse_constant=lambda word: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    return json_object(head(path, 1 << 20)) or {}


def head(path: Path, most: int) -> str:
    """The first `most` bytes of a regular file as text; empty where there is none."""
    return read(path, 0, most).decode("utf-8", "replace")


def tail(path: Path, most: int, offset: int = 0) -> tuple[str, int, int]:
    """(the text of a regular file from the byte `offset` on, the byte after it, how many bytes before it were left out
    so that it has at most `most`). A file that is shorter than `offset` is another one, and read from its beginning.
    """
    size = size_of(path)
    start = offset if offset <= size else 0
    begin = max(start, size - most)
    data = read(path, begin, most)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, begin + len(data) - len(decoder.getstate()[0]), begin - start  # half a character waits for its rest


def read(path: Path, begin: int, most: int = -1) -> bytes:
    """At most `most` bytes (-1: all) of a regular file from a byte on; none where there is no such file."""
    try:
        with open_regular(path, UserError) as file:
            file.seek(begin)
            return file.read(most)
    except (FileNotFoundError, UserError):
        return b""


def size_of(path: Path) -> int:
    """The bytes of a regular file; 0 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
