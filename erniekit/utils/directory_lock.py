"""Lets one process at a time write to a directory, by an operating-system lock on a file in it.

The system releases the lock when its process ends, however it ends, so nothing needs to be cleaned up after a kill. It
is a POSIX record lock: forked children (data workers) do not inherit it, and it works between hosts on NFS.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from erniekit.utils import atomic, log
from erniekit.utils.errors import ConfigError, disk_is_full

LOCK_FILE = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_WAIT_SECONDS = 2.0  # a killed process may need a moment to free its memory, and only then its lock
_PROBE_SECONDS = 0.1

# Paths locked by this process. Record locks do not exclude one another within a process, and closing any descriptor of
# the file releases them.
_locked_paths: set[Path] = set()


def make_directory(directory: Path, key: str) -> None:
    """Create a directory for results if it does not exist, and check that files can be created in it. Raises
    ConfigError that names the YAML key `key`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _unusable(directory, key, error) from None
    except ValueError:  # raised by Python itself: no system accepts such a name
        raise ConfigError(f"{key}: {str(directory)!r} holds a NUL character. Choose another name.") from None


def require_usable(directory: Path, key: str) -> None:
    """Raise what `make_directory` would, as far as that is known without creating anything."""
    try:
        for path in (directory.absolute(), *directory.absolute().parents):
            try:
                mode = path.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                if path.is_symlink():
                    raise FileExistsError(errno.EEXIST, "a link to nothing") from None
                continue
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(path, os.W_OK | os.X_OK):
                number = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(number, os.strerror(number))
            return
    except OSError as error:
        raise _unusable(directory, key, error) from None


def _unusable(directory: Path, key: str, error: OSError) -> ConfigError:
    if disk_is_full(error):
        cure = "Free some space, or choose a directory on another disk."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure = "Change its permissions, or choose another directory."
    else:
        cure = "Choose a directory that exists or can be made."
    name = str(directory) if len(str(directory)) <= 200 else f"{str(directory)[:80]}..."
    reason = error.strerror
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "a link to nothing" if directory.is_symlink() else "it, or a part of its path, is not a directory"
    return ConfigError(f"{key}: {name} cannot be used: {reason}. {cure}")


class DirectoryLock:
    """The lock of `directory`; `key` is the YAML key that gave it, for messages. `file`: the file that is locked, if it
    is not one in the directory, which then need not exist.
    """

    def __init__(self, directory: Path, key: str = "output_dir", file: Path | None = None) -> None:
        self.directory, self.key = directory, key
        self.path = file or directory / LOCK_FILE
        self._descriptor: int | None = None
        self._name: Path | None = None

    def acquire(self, wait: float = _WAIT_SECONDS) -> None:
        """Create the file's directory if necessary and lock the file. Raises ConfigError if another process has the
        lock (with its host and process id) or if the directory is not writable.
        """
        make_directory(self.path.parent, self.key)
        name = self.path.resolve()
        if name in _locked_paths:
            raise self._in_use({"pid": os.getpid(), "host": socket.gethostname()})
        deadline = time.monotonic() + wait
        while self._descriptor is None:
            descriptor = self._open()
            try:
                holder = self._try_lock(descriptor)
                if holder is None and self._is_current(descriptor):
                    self._descriptor, self._name = descriptor, name
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
            if holder is not None:
                if time.monotonic() > deadline:
                    raise self._in_use(holder)
                time.sleep(_PROBE_SECONDS)
        _locked_paths.add(name)
        self._sign()

    def release(self) -> None:
        """Release the lock and remove its file. Has no effect if this object does not have the lock."""
        if self._descriptor is None:
            return
        assert self._name is not None
        try:
            if self._is_current(self._descriptor):
                self.path.unlink(missing_ok=True)
        except OSError as error:  # the directory is no longer writable; the lock is released all the same
            log.warning(f"{self.path}: cannot be removed ({error.strerror})")
        os.close(self._descriptor)
        _locked_paths.discard(self._name)
        self._descriptor = self._name = None

    def require_free(self) -> None:
        """Raise ConfigError if another process has the lock, without locking or creating anything."""
        if not self.path.is_file():
            return
        descriptor = self._open()
        try:
            holder = self._try_lock(descriptor)
        finally:
            os.close(descriptor)
        if holder is not None:
            raise self._in_use(holder)

    def _open(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            if self.path.is_symlink() or self.path.is_dir():
                raise self._not_a_file() from None
            raise _unusable(self.directory, self.key, error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self._not_a_file()
        return descriptor

    def _try_lock(self, descriptor: int) -> dict[str, Any] | None:
        """Try to get the lock: None on success, otherwise what its holder wrote into the file."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(
                    f"{self.key}: the file system of {self.directory} has no locks ({error.strerror}): a second job "
                    "in this directory would not be noticed"
                )
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise _unusable(self.directory, self.key, error) from None
            return _holder(descriptor)
        return None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the open file still exists under the lock's name: its last holder may have removed it."""
        try:
            named = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), named)

    def _sign(self) -> None:
        """Write this process's host, id and start time into the file."""
        assert self._descriptor is not None
        fields = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(fields) + "\n").encode(), 0)
            os.fsync(self._descriptor)
        except OSError as error:
            self.release()
            raise _unusable(self.directory, self.key, error) from None

    def _in_use(self, holder: dict[str, Any]) -> ConfigError:
        facts = {"pid": "unknown", "host": "an unknown host"} | holder
        since = f", since {facts['since']}" if "since" in facts else ""
        return ConfigError(
            f"{self.key}: {self.directory} is in use by process {facts['pid']} on {facts['host']}{since}. Wait until "
            f"that job has ended, or choose another {self.key}. (If that host is gone for good, delete {self.path}.)"
        )

    def _not_a_file(self) -> ConfigError:
        return ConfigError(f"{self.key}: {self.path} is not a regular file. Remove it, or choose another {self.key}.")


def is_being_written(temporary: Path) -> bool:
    """Whether a process has locked the file that belongs to a shared temporary name (atomic.lock_file). A file that a
    killed process left is removed.
    """
    lock = DirectoryLock(temporary, file=atomic.lock_file(temporary))
    if not lock.path.is_file():
        return False
    try:
        lock.acquire(wait=0)
    except ConfigError:
        return True
    lock.release()
    return False


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):  # the holder has not written it yet
        return {}
    return content if isinstance(content, dict) else {}
