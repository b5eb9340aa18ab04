"""A checkpoint is whole or it is not there."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from erniekit.checkpoint.manager import CheckpointManager, list_checkpoints
from erniekit.checkpoint.safetensors_write import write_error
from erniekit.export.target import model_target
from erniekit.utils import atomic
from erniekit.utils.errors import CheckpointError


def writer(text):
    def write(directory):
        (directory / "weights").write_text(text)
        (directory / "deep").mkdir()
        (directory / "deep" / "state").write_text(text)

    return write


def names(directory):
    return [path.name for path in list_checkpoints(directory)]


def test_checkpoints_are_listed_by_step_not_by_name(tmp_path):
    manager = CheckpointManager(tmp_path, None)
    for step in (10, 9, 100):
        manager.save(step, writer("x"))
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert manager.newest().name == "checkpoint-100"


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    manager = CheckpointManager(tmp_path, None)
    manager.save(1, writer("old"))
    manager.save(1, writer("new"))
    assert (tmp_path / "checkpoint-1" / "deep" / "state").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


def test_the_limit_removes_the_oldest_and_keeps_the_best(tmp_path):
    manager = CheckpointManager(tmp_path, 2)
    for step in (1, 2, 3, 4):
        manager.save(step, writer("x"), keep=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


def test_a_limit_of_one_keeps_the_newest(tmp_path):
    manager = CheckpointManager(tmp_path, 1)
    for step in (1, 2):
        manager.save(step, writer("x"))
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("of_weights", [False, True])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_one_clear_message(tmp_path, of_weights):
    manager = CheckpointManager(tmp_path, None)
    manager.save(1, writer("good"))

    def full(directory):
        (directory / "weights").write_text("half")
        error = OSError(errno.ENOSPC, "No space left on device")
        if of_weights:  # the writer of weights has a message of its own, which knows nothing of checkpoints
            raise write_error(error, directory, 1000) from error
        raise error

    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 could not be written.*disk is full.*checkpoint-1 is unharmed"
    ):
        manager.save(2, full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "good"


def test_a_failed_save_says_where_the_run_goes_on(tmp_path):
    """The first one has nothing to resume from; a later one, and a final model, have."""

    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    manager = CheckpointManager(tmp_path, None)
    for save in (lambda: manager.save(1, full), lambda: manager.save_into(tmp_path / "final", full, [])):
        with pytest.raises(CheckpointError, match=r"where this run began, since there is no checkpoint yet") as error:
            save()
        assert "unharmed" not in str(error.value) and "newest" not in str(error.value)
    manager.save(1, writer("good"))
    for save in (lambda: manager.save(2, full), lambda: manager.save_into(tmp_path / "final", full, [])):
        with pytest.raises(CheckpointError, match=r"unharmed\. .* again; it resumes from the newest checkpoint\."):
            save()


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    """As on a network file system while another process has one of its files open."""

    def busy(path, **options):
        if ".removed-" in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", "weights")

    manager = CheckpointManager(tmp_path, 1)
    manager.save(1, writer("old"))
    monkeypatch.setattr(atomic.shutil, "rmtree", busy)
    manager.save(2, writer("new"))
    monkeypatch.setattr(atomic.os, "rename", busy_rename(atomic.os.rename, "checkpoint-2"))
    manager.save(3, writer("newest"))
    said = capfd.readouterr().err
    assert "cannot be deleted (Directory not empty: weights)" in said
    assert "save_total_limit: " in said and "checkpoint-2 cannot be removed (Device or resource busy); it stays" in said
    kept = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    manager.remove_leftovers()
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".checkpoint-1.removed")]) == 1


def busy_rename(rename, name):
    """A rename that the system refuses for one name."""

    def refusing(source, target):
        if source.name == name:
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    return refusing


def test_a_full_disk_names_the_command_that_keeps_what_is_saved(tmp_path):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    manager = CheckpointManager(tmp_path, None, command=lambda: "the same command with overwrite_output_dir=false")
    manager.save(1, writer("good"))
    with pytest.raises(CheckpointError, match="run the same command with overwrite_output_dir=false again"):
        manager.save(2, full)


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    def broken(directory):
        (directory / "weights").write_text("half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        CheckpointManager(tmp_path, None).save(1, broken)
    assert list(tmp_path.iterdir()) == []


def _save_slowly(directory):
    def slow(target):
        (target / "weights").write_text("half")
        time.sleep(60)

    CheckpointManager(directory, None).save(2, slow)


def test_kill_during_a_save_leaves_the_old_one_and_the_next_run_cleans_up(tmp_path):
    manager = CheckpointManager(tmp_path, None)
    manager.save(1, writer("good"))
    process = multiprocessing.get_context("fork").Process(target=_save_slowly, args=(tmp_path,))
    process.start()
    for _ in range(500):
        if (tmp_path / ".checkpoint-2.new.tmp" / "weights").exists():
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert names(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / ".checkpoint-2.new.tmp").exists()
    manager.remove_leftovers()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


EXPORT = """
import sys, time
from pathlib import Path
from erniekit.export.target import model_target
with model_target(Path(sys.argv[1]) / "export", "export", [sys.argv[1]], False, ""):
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_an_export_is_writing_is_left_alone_until_it_is_killed(tmp_path):
    staging, manager = tmp_path / ".export.new.tmp", CheckpointManager(tmp_path, 1)
    process = subprocess.Popen([sys.executable, "-c", EXPORT, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        manager.remove_leftovers()
        assert staging.is_dir()
    finally:
        process.kill()
        process.communicate()
    manager.remove_leftovers()
    assert list(tmp_path.iterdir()) == []


OTHER = """
import sys
from pathlib import Path
from erniekit.utils.directory_lock import DirectoryLock
DirectoryLock(Path(sys.argv[1]), file=Path(sys.argv[1]) / ".export.use.tmp").acquire(wait=0)
print("locked")
"""


def test_an_export_of_this_process_keeps_its_lock(tmp_path):
    """The system releases a record lock as soon as its process closes any descriptor of the file."""
    with model_target(tmp_path / "export", "export", [tmp_path], False, ""):
        CheckpointManager(tmp_path, 1).remove_leftovers()
        other = subprocess.run([sys.executable, "-c", OTHER, tmp_path], capture_output=True, text=True)
    assert other.stdout == "" and "is in use by process" in other.stderr


def test_other_files_in_the_directory_are_not_touched(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / ".hidden.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    manager = CheckpointManager(tmp_path, 1)
    manager.remove_leftovers()
    manager.save(5, writer("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden.tmp", "checkpoint-5", "checkpoint-x", "notes.txt"]


def test_abandoned_checkpoints_do_not_count(tmp_path):
    manager = CheckpointManager(tmp_path, 1)
    for step in (2, 6):
        manager.save(step, writer(str(step)))
    (tmp_path / "far").mkdir()
    (tmp_path / "checkpoint-8").symlink_to("far")
    aside = manager.new_aside()
    manager.set_aside(list_checkpoints(tmp_path), aside)
    assert manager.newest() is None
    manager.save(3, writer("3"))
    manager.save(5, writer("5"))
    assert names(tmp_path) == ["checkpoint-5"] and names(aside) == ["checkpoint-6", "checkpoint-8"]
    assert (aside / "checkpoint-8").resolve() == tmp_path / "far"
    assert manager.new_aside().name == "abandoned-2"


def test_the_limit_removes_a_linked_checkpoint_but_not_what_it_leads_to(tmp_path):
    manager = CheckpointManager(tmp_path, 1)
    (tmp_path / "far").mkdir()
    (tmp_path / "checkpoint-1").symlink_to("far")
    manager.save(2, writer("x"))
    assert names(tmp_path) == ["checkpoint-2"] and (tmp_path / "far").is_dir()


def test_a_directory_that_is_gone_is_not_made_again(tmp_path):
    manager = CheckpointManager(tmp_path / "out", None)
    with pytest.raises(CheckpointError, match="was removed or renamed"):
        manager.save(2, writer("x"))
    assert list(tmp_path.iterdir()) == []
