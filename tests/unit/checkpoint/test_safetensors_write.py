"""Our writer of safetensors files: the format's own library reads them, and a failed write leaves what was there."""

import errno
import json
import threading

import numpy as np
import pytest
from support.safetensors_files import assert_holds, some_tensors, write

from erniekit.checkpoint import safetensors_write
from erniekit.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer, parse_size
from erniekit.utils.errors import CheckpointError


def test_single_file_and_shards_read_back(tmp_path):
    tensors = some_tensors()
    write(tmp_path / "one", tensors)
    assert [file.name for file in (tmp_path / "one").iterdir()] == [SINGLE_FILE]
    assert_holds(tmp_path / "one", tensors)
    assert_holds(tmp_path / "one" / SINGLE_FILE, tensors)

    writer = write(tmp_path / "many", tensors, max_shard_size=61)
    assert len(writer.files) > 1 and writer.files[0] == f"model-00001-of-{len(writer.files):05d}.safetensors"
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == sorted([*writer.files, INDEX_FILE])
    assert_holds(tmp_path / "many", tensors)
    index = json.loads((tmp_path / "many" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in tensors.values())
    for file in writer.files:
        held = [name for name, where in index["weight_map"].items() if where == file]
        assert len(held) == 1 or sum(tensors[name][1].nbytes for name in held) <= 61


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    tensors = {name: ("F32", np.full(10, i, np.float32)) for i, name in enumerate("abc")}
    assert len(write(tmp_path, tensors, max_shard_size="1KB").files) == 1
    assert len(write(tmp_path, tensors, max_shard_size=8).files) == 3
    assert_holds(tmp_path, tensors)


def test_the_library_reads_ours(tmp_path):
    library = pytest.importorskip("safetensors")
    tensors = some_tensors()
    write(tmp_path, tensors, metadata={"format": "pt"})
    with library.safe_open(tmp_path / SINGLE_FILE, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, (dtype, array) in tensors.items():
            assert file.get_slice(name).get_dtype() == dtype
            if dtype != "BF16":  # numpy has no bfloat16
                assert file.get_tensor(name).tobytes() == array.tobytes()


def test_the_library_reads_our_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    tensors = some_tensors()
    write(tmp_path, tensors)
    loaded = library.load_file(tmp_path / SINGLE_FILE)["b.weight"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.view(torch.int16).numpy().tobytes() == tensors["b.weight"][1].tobytes()


def test_a_new_save_replaces_the_old_one_wholly(tmp_path):
    many = {f"t{i}": ("F32", np.full(4, i, np.float32)) for i in range(5)}
    write(tmp_path, many, max_shard_size=32)
    (tmp_path / "config.json").write_text("{}")
    few = {"t0": ("F32", np.full(4, 9, np.float32))}
    write(tmp_path, few)
    assert_holds(tmp_path, few)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", SINGLE_FILE]
    write(tmp_path, many, max_shard_size=16)
    assert_holds(tmp_path, many)
    assert not (tmp_path / SINGLE_FILE).exists() and len(list(tmp_path.iterdir())) == 5 + 2


@pytest.mark.parametrize("fail_at", [0, 1, 3, 8, 9, 10])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fail_at):
    old = {"t0": ("F32", np.full(4, 9, np.float32)), "t1": ("F32", np.zeros(4, np.float32))}
    write(tmp_path, old, max_shard_size=16)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls, real = [], safetensors_write._write_all

    def write_all(file, data):
        calls.append(len(data))
        if len(calls) > fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(safetensors_write, "_write_all", write_all)
    new = {f"t{i}": ("F32", np.full(1_000_000, i, np.float32)) for i in range(5)}
    with pytest.raises(CheckpointError, match=r"disk of .* is full.*20\.0 MB"):
        write(tmp_path, new, max_shard_size=4_000_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_crash_while_shards_get_their_names_leaves_no_index(tmp_path, monkeypatch):
    tensors = {name: ("F32", np.zeros(4, np.float32)) for name in "abc"}
    write(tmp_path, tensors, max_shard_size=16)

    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_write.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, tensors, max_shard_size=16)
    with pytest.raises(CheckpointError, match="interrupted"):
        Reader(tmp_path)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_an_error_between_writes_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), Writer(tmp_path, [("a", "F32", (2,)), ("b", "F32", (2,))]) as writer:
        writer.write("a", np.zeros(2, np.float32))
        raise KeyError("the caller's own")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_differ_from_the_plan_are_refused(tmp_path):
    plan = [("a", "F32", (2,)), ("b", "BF16", (2,))]
    with pytest.raises(AssertionError, match="plan says a"), Writer(tmp_path, plan) as writer:
        writer.write("b", np.zeros(2, np.uint16))
    with pytest.raises(AssertionError), Writer(tmp_path, plan) as writer:
        writer.write("a", np.zeros(2, np.float64))
    with pytest.raises(AssertionError, match="1 planned"), Writer(tmp_path, plan) as writer:
        writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="twice"):
        Writer(tmp_path, [("a", "F32", (2,)), ("a", "F32", (2,))])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_in_parts(tmp_path):
    tensors = some_tensors()
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(tmp_path, plan, 61) as writer:
        for name, (_, array) in tensors.items():
            for part in np.array_split(array, 3) if array.ndim and len(array) > 2 else [array]:
                assert writer.next_name == name
                writer.append(name, part)
        assert writer.next_name is None
    assert_holds(tmp_path, tensors)
    with pytest.raises(AssertionError), Writer(tmp_path / "more", [("a", "F32", (2, 3))]) as writer:
        writer.append("a", np.zeros((3, 3), np.float32))
    with pytest.raises(AssertionError, match="1 planned"), Writer(tmp_path / "less", [("a", "F32", (2, 3))]) as writer:
        writer.append("a", np.zeros((1, 3), np.float32))


def test_an_error_while_the_disk_writes_in_the_background_is_not_lost(tmp_path, monkeypatch):
    """The system tells it once: to the fsync in the other thread, and not to the last one."""
    calls, real = [], safetensors_write.os.fsync

    def fsync(descriptor):
        calls.append(threading.current_thread().name)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(safetensors_write, "_SYNC_BYTES", 1)
    monkeypatch.setattr(safetensors_write.os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path, {"a": ("F32", np.zeros(4, np.float32))})
    assert calls == ["erniekit-sync"] and list(tmp_path.iterdir()) == []


def test_parse_size():
    assert [parse_size(text) for text in ("5GB", "1.5 MB", "2GiB", 7, "10", "3kb", "1e-06GB")] == [
        5 * 10**9,
        1_500_000,
        2**31,
        7,
        10,
        3000,
        1000,
    ]
    for bad in ("", "GB", "5 parsecs", "-1GB", 0, "0GB", "1e400"):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(bad)
