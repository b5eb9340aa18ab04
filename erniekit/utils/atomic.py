"""Files and directories that are whole or not there: write beside, force to disk, rename.

A process killed at any moment leaves the old content or the new one, plus at most a temporary name that
`remove_leftovers` deletes at the next start.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Temporary names begin with a dot and end in .tmp, so that no reader of a directory takes them for content.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(new|removed)(-\d+-\d+)?\.tmp$")


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it is forced to disk and renamed to `path` on success, and removed
    on an error. OSErrors are the caller's.
    """
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content; readers see the old content or the new one."""
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by `text` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Replace a file's content by readable JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def shared_temporary(path: Path) -> Path:
    """The temporary name of `path` that all processes that write it together agree on. They need a lock, or an owner,
    against others.
    """
    return path.with_name(f".{path.name}.new.tmp")


def replace_tree(temporary: Path, target: Path) -> None:
    """Give a complete directory its name. One that has the name already is renamed first and deleted last: a rename
    cannot replace a directory that is not empty.
    """
    doomed = _doomed(target) if os.path.lexists(target) else None
    if doomed is not None:
        os.rename(target, doomed)
    os.rename(temporary, target)
    sync_directory(target.parent)
    if doomed is not None:
        _delete(doomed)


def remove_tree(directory: Path) -> None:
    """Delete a directory: rename it first, so that a kill halfway never leaves half of it under its name. A symbolic
    link is unlinked; what it points to stays.
    """
    doomed = _doomed(directory)
    os.rename(directory, doomed)
    sync_directory(directory.parent)
    _delete(doomed)


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.removed-{os.getpid()}-{threading.get_ident()}.tmp")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(directory: Path) -> list[Path]:
    """What killed processes left in `directory`: half-written files and half-deleted directories."""
    return sorted(path for path in directory.iterdir() if _TEMPORARY.match(path.name))


def remove_leftovers(directory: Path) -> list[str]:
    """Delete what killed processes left in `directory`; returns the names, for a log line. Only for the process that
    owns the directory: another one may still be writing there.
    """
    removed = []
    for path in leftovers(directory):
        _delete(path)
        removed.append(path.name)
    return removed
