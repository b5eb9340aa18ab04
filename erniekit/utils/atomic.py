"""Writes files and directories atomically: write under a temporary name, force to disk, rename.

After a kill at any moment the target has its old or its new content. At most a temporary file or directory is left,
which `remove_leftovers` deletes at the next start.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from erniekit.utils import log

_NOT_BUILT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what a system says of what it cannot do
# Temporary names begin with a dot and end in .tmp, so that no reader of the directory uses them.
_LONGEST_NAME = 255  # bytes, on all file systems in use
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(new|removed)(-\d+-\d+)?\.tmp$")


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to disk, so that a rename in it survives a power failure. Some file systems of
    networks and of encryption cannot do that; a warning says so, since nothing else can be done there.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_BUILT:
            raise
        log.once(
            f"a file system that is written to cannot force the names of files to disk ({error.strerror}): after a "
            "power failure the newest files may be missing"
        )
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Force every file below `directory`, and the directories, to disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(root))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A context with a temporary path next to `path`. On success the file is forced to disk and renamed to `path`, on
    an error it is removed. OSErrors are raised as they are.
    """
    temporary = _temporary(path, f"new-{os.getpid()}-{threading.get_ident()}")
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
    """A temporary name of `path` that is the same in all processes that write it together. A lock, or ownership of the
    directory, must exclude other writers.
    """
    return _temporary(path, "new")


def lock_file(temporary: Path) -> Path:
    """The file that a process locks while it writes what has a shared temporary name."""
    return temporary.with_name(temporary.name.removesuffix("new.tmp") + "use.tmp")


def replace_tree(temporary: Path, target: Path) -> None:
    """Rename a complete directory to its final name. A directory that has this name is renamed first and deleted last,
    since a rename cannot replace a directory that is not empty.
    """
    removed = _removal_name(target) if os.path.lexists(target) else None
    if removed is not None:
        os.rename(target, removed)
    os.rename(temporary, target)
    sync_directory(target.parent)
    if removed is not None:
        _discard(removed)


def remove_tree(directory: Path) -> None:
    """Delete a directory. It is renamed first, so that an interruption never leaves an incomplete directory under its
    name. Of a symbolic link only the link is removed. OSErrors of the rename are raised; what cannot be deleted after
    it is left under its temporary name, with a warning.
    """
    removed = _removal_name(directory)
    os.rename(directory, removed)
    sync_directory(directory.parent)
    _discard(removed)


def _removal_name(path: Path) -> Path:
    return _temporary(path, f"removed-{os.getpid()}-{threading.get_ident()}")


def _temporary(path: Path, what: str) -> Path:
    """A temporary name beside `path`; a hash stands for a name that would become too long for a file system."""
    name = f".{path.name}.{what}.tmp"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.{what}.tmp"
    return path.with_name(name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> bool:
    """Delete what has a temporary name; False, with a warning, where the system refuses: on a network file system a
    directory cannot be deleted while a process on another host has one of its files open.
    """
    try:
        _delete(path)
    except OSError as error:
        log.warning(f"{path} cannot be deleted ({error.strerror}: {error.filename}). It is not used; delete it by hand")
        return False
    return True


def leftovers(directory: Path) -> list[Path]:
    """The temporary files and directories that killed processes left in `directory`."""
    return sorted(path for path in directory.iterdir() if _TEMPORARY.match(path.name))


def remove_leftovers(directory: Path, in_use: Callable[[Path], bool] = lambda path: False) -> list[str]:
    """Delete what killed processes left in `directory` and return the names, for a log line; what cannot be deleted
    stays, with a warning, and what is `in_use` without one. Only the process that owns the directory may call this,
    since another process might still be writing.
    """
    return [path.name for path in leftovers(directory) if not in_use(path) and _discard(path)]
