"""Files and directories are whole or not there."""

import errno
import os
import stat
from pathlib import Path

import pytest

from erniekit.utils import atomic, log


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path):
    target = tmp_path / "x.json"
    atomic.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(target, {"a": object()})
    with pytest.raises(RuntimeError), atomic.new_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_directory_is_renamed_before_it_is_emptied(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "weights").write_text("w")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic.remove_tree(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2").exists()
    monkeypatch.undo()
    assert len(atomic.remove_leftovers(tmp_path)) == 1
    assert not list(tmp_path.iterdir())


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    atomic.remove_tree(tmp_path / "link")
    assert [p.name for p in tmp_path.iterdir()] == ["real"]


def test_leftovers_are_only_our_own_temporary_names(tmp_path):
    for name in (".x.json.new-1-2.tmp", ".checkpoint-2.removed-1-2.tmp", ".mine.tmp", "notes.new.tmp", ".hidden"):
        (tmp_path / name).write_text("")
    assert atomic.remove_leftovers(tmp_path) == [".checkpoint-2.removed-1-2.tmp", ".x.json.new-1-2.tmp"]


def test_a_directory_takes_the_place_of_another_or_of_a_link_to_nothing(tmp_path):
    for number in range(2):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(str(number))
        atomic.replace_tree(tmp_path / "new", tmp_path / "target")
    os.symlink(tmp_path / "nothing", tmp_path / "link")
    atomic.replace_tree(tmp_path / "target", tmp_path / "link")
    assert (tmp_path / "link" / "file").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("name", ["a" * 255, "字" * 85], ids=["letters", "characters of three bytes"])
def test_the_longest_names_have_temporary_ones_too(tmp_path, name):
    atomic.write_text(tmp_path / name, "one")
    atomic.write_text(tmp_path / name, "two")
    (tmp_path / "whole").mkdir()
    temporary = atomic.shared_temporary(tmp_path / name)
    (tmp_path / "whole").rename(temporary)
    assert atomic.leftovers(tmp_path) == [temporary] and len(os.fsencode(temporary.name)) <= 255
    atomic.replace_tree(temporary, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_directories_is_written_to(tmp_path, monkeypatch, number):
    synced = refuse_to_sync_directories(monkeypatch, number)
    (tmp_path / "new" / "inner").mkdir(parents=True)
    (tmp_path / "new" / "inner" / "file").write_text("x")
    with log.captured() as lines:
        atomic.sync_tree(tmp_path / "new")
        atomic.replace_tree(tmp_path / "new", tmp_path / "target")
        atomic.write_text(tmp_path / "text", "y")
    assert (tmp_path / "target" / "inner" / "file").read_text() == "x" and (tmp_path / "text").read_text() == "y"
    assert len(synced) == 2  # the two files
    assert len(lines) == 1 and "cannot force the names of files to disk" in lines[0][1]


def test_a_directory_that_cannot_be_synced_for_another_reason_is_an_error(tmp_path, monkeypatch):
    refuse_to_sync_directories(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        atomic.write_text(tmp_path / "text", "y")


def refuse_to_sync_directories(monkeypatch, number):
    """Make os.fsync fail for directories; the list gets the descriptors of files."""
    real, synced = os.fsync, []

    def sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", sync)
    return synced
