"""Our safetensors files against the format's own library, and what is said of files that are not whole."""

import errno
import json
import struct

import numpy as np
import pytest

from erniekit.checkpoint import safetensors_read, safetensors_write
from erniekit.checkpoint.dtypes import STORAGE
from erniekit.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer, parse_size
from erniekit.utils.bfloat16 import fp32_to_bf16
from erniekit.utils.errors import CheckpointError


def some_tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": ("F32", rng.standard_normal((3, 5)).astype(np.float32)),
        "b.weight": ("BF16", fp32_to_bf16(rng.standard_normal((4, 2)).astype(np.float32))),
        "c": ("F16", rng.standard_normal(7).astype(np.float16)),
        "scalar": ("F32", np.array(2.5, np.float32)),
        "empty": ("F32", np.zeros((0, 3), np.float32)),
        "ids": ("I64", np.arange(3)),
        "flags": ("BOOL", np.array([True, False])),
    }


def write(directory, tensors, **options):
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(directory, plan, **options) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
    return writer


def assert_holds(directory, tensors):
    reader = Reader(directory)
    assert set(reader.keys()) == set(tensors)
    for name, (dtype, array) in tensors.items():
        assert reader.info(name) == (dtype, array.shape)
        read = reader.read(name)
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


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


def test_we_read_the_library_s(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, (dtype, array) in some_tensors().items() if dtype != "BF16"}
    library.save_file(arrays, tmp_path / SINGLE_FILE, metadata={"format": "np"})
    reader = Reader(tmp_path)
    for name, array in arrays.items():
        assert reader.read(name).tobytes() == array.tobytes() and reader.read(name).shape == array.shape


def test_as_fp32_and_uint16_files(tmp_path):
    values = np.array([1.0, -2.5, 3.0], np.float32)
    bits = fp32_to_bf16(values)
    write(tmp_path, {"b": ("BF16", bits), "u": ("U16", bits), "i": ("I64", np.arange(2))})
    reader = Reader(tmp_path)
    np.testing.assert_array_equal(reader.read("b", as_fp32=True), values)
    with pytest.raises(CheckpointError, match="U16"):
        reader.read("u", as_fp32=True)
    old_paddle = Reader(tmp_path, u16_is_bf16=True)
    assert old_paddle.info("u").dtype == "BF16" and old_paddle.read("u").tobytes() == bits.tobytes()
    np.testing.assert_array_equal(old_paddle.read("u", as_fp32=True), values)
    with pytest.raises(CheckpointError, match="no tensor nope"):
        reader.read("nope")


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


def test_the_plan_is_kept(tmp_path):
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


def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes"]),
        (b"PK\x03\x04" + b"\0" * 30, ["too short"]),
        (raw({}, length=10**12), ["too short"]),
        (raw(b"not json"), ["not JSON"]),
        (raw(b"\xff\xfe\xff"), ["not JSON"]),
        (raw([1]), ["not JSON"]),
        (raw({"x": entry(0, 4)}, b"123"), ["truncated"]),
        (raw({"x": entry(0, 4)}, b"12345"), ["longer"]),
        (raw({"x": entry(0, 4), "y": entry(2, 6)}, b"123456"), ["y", "overlaps"]),
        (raw({"x": entry(0, 4), "y": entry(6, 10)}, b"1234567890"), ["y", "gap"]),
        (raw({"x": entry(0, 8)}, b"12345678"), ["x", "8 bytes for F32"]),
        (raw({"x": entry(0, 4, (-1,))}, b"1234"), ["x", "natural"]),
        (raw({"x": {"dtype": "F32"}}, b""), ["x", "lacks"]),
        (raw({"x": entry(0, 4, dtype="F4")}, b"1234"), ["x", "F4", "not supported"]),
        (raw(b'{"x": {"dtype": "F32"}, "x": {"dtype": "F32"}}'), ["twice"]),
        (raw(b"[" * 5000), ["not JSON"]),
        (raw(b'{"x": ' + b"[" * 5000), ["levels"]),
        (raw({"x": entry(0, 4, dtype=["F32"])}, b"1234"), ["x", "type"]),
        (raw({"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234"), ["x", "natural"]),
        (raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"), ["x", "natural"]),
        (raw({"x": entry(0, 0, (2**62, 2**62, 0))}), ["x", "no tensor can have the shape"]),
        (raw({"x": entry(0, 0, (0,) * 40)}), ["x", "no tensor can have the shape"]),
        (raw(b'{"x": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'), ["natural"]),
        (raw({"\ud800": entry(0, 4)}, b"1234"), ["half of a pair"]),
        (raw({"__metadata__": {"format": 1}}), ["__metadata__", "strings"]),
        (raw({"__metadata__": []}), ["__metadata__", "strings"]),
        (raw(b"\xef\xbb\xbf{}"), ["not JSON"]),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Reader(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_file_cut_short_on_disk(tmp_path):
    write(tmp_path, some_tensors())
    path = tmp_path / SINGLE_FILE
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        Reader(tmp_path)


def test_a_file_cut_short_after_it_was_opened(tmp_path):
    write(tmp_path, {"a": ("F32", np.zeros(100, np.float32))})
    reader = Reader(tmp_path)
    with open(tmp_path / SINGLE_FILE, "r+b") as file:
        file.truncate(300)
    with pytest.raises(CheckpointError, match="truncated"):
        reader.read("a")


def test_directories_that_are_not_one_model(tmp_path, caplog):
    with pytest.raises(CheckpointError, match="no weights"):
        Reader(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Reader(tmp_path / "none.safetensors")
    (tmp_path / "model_state.pdparams").write_text("x")
    with pytest.raises(CheckpointError, match=r"no weights.*model_state\.pdparams"):
        Reader(tmp_path)
    tensors = {name: ("F32", np.zeros(4, np.float32)) for name in "abc"}
    write(tmp_path, tensors, max_shard_size=16)
    index = tmp_path / INDEX_FILE
    good = index.read_text()
    (tmp_path / SINGLE_FILE).write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="stale"):
        Reader(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    for content, words in [
        ("{", "not JSON"),
        ('{"weight_map": {}}', "not an index .* without any"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a safetensors file beside it"),
        (good.replace('"a"', '"z"'), "z"),
        ('{"weight_map": {"a": "a\\u0000b.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "..\\\\b.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "' + "x" * 300 + '.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands twice"),
        ('{"weight_map": ["a"]}', "not an index .* a list"),
        (good.replace("model-00001-of-00003", "model-00009-of-00003"), "not found"),
    ]:
        index.write_text(content)
        with pytest.raises(CheckpointError, match=words):
            Reader(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        Reader(tmp_path)


def test_tensors_that_the_index_leaves_out_are_counted(tmp_path, capfd):
    tensors = {name: ("F32", np.zeros(4, np.float32)) for name in "abcd"}
    write(tmp_path, tensors, max_shard_size=32)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    del index["weight_map"]["d"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_read.log, "warning", said.append)
        assert sorted(Reader(tmp_path).keys()) == ["a", "b", "c"]
    assert len(said) == 1 and "1 tensors" in said[0] and "d" in said[0]


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
    for bad in ("", "GB", "5 parsecs", "-1GB", 0, "0GB"):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(bad)


def test_storage_covers_what_it_says():
    assert all(np.dtype(kind).byteorder in "<|=" for kind in STORAGE.values())
