"""Saving beside the training: what is written is what was there, and no failure is lost."""

import errno
import json
import shutil
import threading
from contextlib import nullcontext

import numpy as np
import pytest

from erniekit.checkpoint import save_job
from erniekit.checkpoint.manager import CheckpointManager, list_checkpoints
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.parallel import agree
from erniekit.parallel.process_group import Group
from erniekit.utils.errors import CheckpointError, PeerError


def weight_files(values, gate=None, directory=""):
    """`values` as one tensor each; writing waits for `gate`."""

    def encode(name, array):
        if gate is not None:
            assert gate.wait(30)
        return [(name, array)]

    plan = [(name, "F32", array.shape) for name, array in values.items()]
    return RankFiles(
        directory, plan, ((name, array.copy()) for name, array in values.items()), encode, {"format": "pt"}
    )


def nothing(directory):
    pass


def names(directory):
    return [path.name for path in list_checkpoints(directory)]


def test_an_asynchronous_save_writes_the_values_at_its_start(tmp_path):
    manager, gate = CheckpointManager(tmp_path, None), threading.Event()
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    manager.save(1, nothing, [weight_files(weights, gate)], background=True)
    assert names(tmp_path) == []
    weights["w"] += 100
    gate.set()
    manager.wait()
    np.testing.assert_array_equal(Reader(tmp_path / "checkpoint-1").read("w"), np.arange(6.0).reshape(2, 3))


def test_the_next_save_waits_and_the_limit_holds(tmp_path):
    manager, gate = CheckpointManager(tmp_path, 2), threading.Event()
    threading.Timer(0.2, gate.set).start()
    for step in (1, 2, 3, 4):
        manager.save(
            step, nothing, [weight_files({"w": np.ones(2, np.float32)}, gate)], tmp_path / "checkpoint-1", True
        )
    manager.wait()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def full(directory):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_is_logged_at_once_and_raised_by_the_next_save(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(save_job.log, "warning", lines.append)
    manager = CheckpointManager(tmp_path, None)
    manager.save(1, nothing)
    manager.save(2, full, background=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written.*full.*checkpoint-1 is unharmed"):
        manager.save(3, nothing, background=True)
    assert len(lines) == 1 and "checkpoint-2 was not saved" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    manager.save(4, nothing, background=True)  # the failure has been told
    manager.wait()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def test_a_failed_save_is_raised_at_the_end_of_the_run(tmp_path):
    manager = CheckpointManager(tmp_path, None)
    manager.save(1, full, background=True)
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        manager.save_into(tmp_path / "final", nothing, [])


def test_copies_are_counted_and_freed_while_writing():
    held = weight_files({"a": np.zeros(1000, np.float32), "b": np.zeros(10, np.float32)})
    assert held.copy() == 4040
    assert [name for name, _ in held.tensors] == ["a", "b"]
    assert list(held.tensors) == []


@pytest.fixture
def first_of_two(monkeypatch):
    """The first of two ranks, the other of which agrees to everything and says nothing."""
    monkeypatch.setattr(agree.comm, "gather_objects", lambda value, group: [value] + [None] * (group.size - 1))
    return Group((0, 1), 0)


def save(tmp_path, group, limit=0.3):
    mine = weight_files({"a": np.zeros(2, np.float32)})
    mine.numbered = (0, 2)
    temporary, done = tmp_path / ".tmp", tmp_path / "done"
    commit = lambda: temporary.rename(done)  # noqa: E731
    return save_job.Save("checkpoint-1", temporary, [mine], nothing, commit, group, nullcontext, limit)


def test_the_first_rank_names_who_did_not_write(tmp_path, first_of_two, monkeypatch):
    monkeypatch.setattr(save_job, "number", lambda files, group: None)
    with pytest.raises(CheckpointError, match=r"checkpoint-1: rank 1 did not write its files within 0"):
        save(tmp_path, first_of_two).run()
    assert list(tmp_path.iterdir()) == []


def test_the_first_rank_waits_for_the_others_and_makes_the_index(tmp_path, first_of_two, monkeypatch):
    def number(files, group):  # the other rank writes while this one begins
        other = weight_files({"b": np.ones(3, np.float32)})
        other.numbered = (1, 2)
        written = [other.write(tmp_path / ".tmp")]
        (tmp_path / ".tmp" / ".written-1").write_text(json.dumps({"written": written}))

    monkeypatch.setattr(save_job, "number", number)
    save(tmp_path, first_of_two).run()
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    reader = Reader(tmp_path / "done")
    assert reader.keys() == ["a", "b"] and reader.read("b").tolist() == [1, 1, 1]


def test_an_error_of_another_rank_is_raised_with_its_message(tmp_path, first_of_two, monkeypatch):
    def number(files, group):
        (tmp_path / ".tmp" / ".written-1").write_text(json.dumps({"error": "rank 1: the disk is full"}))

    monkeypatch.setattr(save_job, "number", number)
    with pytest.raises(CheckpointError, match="rank 1: the disk is full"):
        save(tmp_path, first_of_two, limit=30).run()


def test_a_rank_whose_directory_the_first_one_removed_tells_the_first_one_s_error(tmp_path, monkeypatch):
    """Not that a file of its own is missing: the first rank's disk was full."""
    other = Group((0, 1), 1)
    monkeypatch.setattr(agree.comm, "gather_objects", lambda value, group: ["the disk is full", value])
    monkeypatch.setattr(save_job, "on_first", lambda group, act: None)
    monkeypatch.setattr(save_job, "number", lambda files, group: None)
    job = save(tmp_path, other)
    [mine] = job.rank_files

    def encode(name, array):  # the first rank fails while this one writes
        shutil.rmtree(job.temporary)
        return [(name, array)]

    mine.encode = encode
    with pytest.raises(PeerError, match=r"^rank 0: the disk is full"):
        job.run()


def test_a_directory_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    said = iter([[None, None], None, [True, False], [None, None], [None, None]])

    def gather(value, group):
        answer = next(said)
        return [value, value] if answer is None else answer

    monkeypatch.setattr(agree.comm, "gather_objects", gather)
    with pytest.raises(CheckpointError, match=r"of rank 0 is not visible to rank 1: .*all hosts share"):
        agree.require_shared(tmp_path, Group((0, 1), 0))
    assert list(tmp_path.iterdir()) == []
