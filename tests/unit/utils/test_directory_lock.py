"""One process at a time in a directory, and a lock that ends with its process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from erniekit.utils import directory_lock
from erniekit.utils.directory_lock import LOCK_FILE, DirectoryLock, make_directory, require_usable
from erniekit.utils.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from erniekit.utils.directory_lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_first_ones_number_until_that_is_killed(holder, tmp_path: Path):
    lock = DirectoryLock(tmp_path / "out")
    for refused in (lambda: lock.acquire(wait=0.0), lock.require_free):
        with pytest.raises(ConfigError, match=rf"output_dir: .*out is in use by process {holder.pid} on \S+, since"):
            refused()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    lock.require_free()
    lock.acquire(wait=0.0)
    assert str(os.getpid()) in (tmp_path / "out" / LOCK_FILE).read_text()
    lock.release()
    assert list((tmp_path / "out").iterdir()) == []


def test_two_runs_of_one_process_exclude_one_another(tmp_path: Path):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path):
    """Data workers are forked, and may outlive a killed run for a moment."""
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)
        os._exit(0)
    lock.release()
    DirectoryLock(tmp_path).acquire(wait=0.0)
    os.write(writer, b"x")
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(directory_lock.fcntl, "lockf", no_locks)
    monkeypatch.setattr(directory_lock.log, "warning", said.append)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    lock.release()
    assert len(said) == 1 and "would not be noticed" in said[0]


def a_file(path: Path) -> Path:
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: a_file(root / "file"), "is not a directory"),
        (lambda root: a_file(root / "file") / "below", "is not a directory"),
        (lambda root: (root / "link").symlink_to(root / "nothing") or root / "link", "a link to nothing"),
        (lambda root: root / ("n" * 256), "File name too long"),
        (lambda root: Path("/proc/1/erniekit"), "cannot be used"),
        (lambda root: root / "a\0b", "NUL"),
        (lambda root: (root / LOCK_FILE).mkdir() or root, "not a regular file"),
        (lambda root: os.mkfifo(root / LOCK_FILE) or root, "not a regular file"),
        (lambda root: (root / LOCK_FILE).symlink_to(root / "private") or root, "not a regular file"),
    ],
)
def test_a_directory_that_cannot_be_used_is_one_message(make, reason: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="output_dir: ") as raised:
        DirectoryLock(make(tmp_path)).acquire(wait=0.0)
    assert reason in str(raised.value) and len(str(raised.value)) < 600
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda root: a_file(root / "file"),
        lambda root: a_file(root / "file") / "below",
        lambda root: (root / "link").symlink_to(root / "nothing") or root / "link",
        lambda root: root / ("n" * 256),
    ],
)
def test_what_cannot_be_made_is_known_without_making_it(make, tmp_path: Path):
    directory = make(tmp_path)
    with pytest.raises(ConfigError) as foreseen:
        require_usable(directory, "output_dir")
    with pytest.raises(ConfigError) as met:
        make_directory(directory, "output_dir")
    assert str(foreseen.value) == str(met.value)


def test_a_directory_that_may_be_made_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_usable(tmp_path / "a" / "b", "output_dir")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(directory_lock.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"output_dir: .*Permission denied. Change its permissions"):
        require_usable(tmp_path / "a" / "b", "output_dir")
