"""Our reader of safetensors files against the format's own library; files that are not whole are refused by name."""

import json
import struct

import numpy as np
import pytest
from support.safetensors_files import some_tensors, write

from erniekit.checkpoint import safetensors_read
from erniekit.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.utils.bfloat16 import fp32_to_bf16
from erniekit.utils.errors import CheckpointError


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
        (b"version https://git-lfs.github.com/spec/v1\n", ["a pointer of Git LFS", "git lfs pull"]),
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
    assert len(said) == 1 and "1 tensor is" in said[0] and "d" in said[0]


def test_a_tensor_in_two_shards_is_named_with_the_shard_that_is_read(tmp_path, capfd):
    shards = {}
    for number, tensors in ((1, {"a": 1, "b": 2}), (2, {"b": 3, "c": 4})):
        name = f"model-{number:05}-of-00002.safetensors"
        write(tmp_path / "one", {key: ("F32", np.full(2, value, np.float32)) for key, value in tensors.items()})
        (tmp_path / "one" / SINGLE_FILE).rename(tmp_path / name)
        shards |= dict.fromkeys(tensors, name)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    assert Reader(tmp_path).read("b").tolist() == [3, 3]
    said = capfd.readouterr().err
    assert "1 tensor is in several shards" in said and "b (read from model-00002-of-00002.safetensors)" in said
