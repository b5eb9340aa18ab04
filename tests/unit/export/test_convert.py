"""Conversion: the same bits there and back, nothing dropped, nothing torn, and little memory."""

import errno
import json
import tracemalloc

import numpy as np
import pytest
from parity.support import CASES, paddle_file_tensors, read_fixture
from safetensors.numpy import load_file

from erniekit.checkpoint import safetensors_write
from erniekit.checkpoint.dtypes import convert as to_dtype
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export import convert as module
from erniekit.export.convert import convert
from erniekit.models.config import ModelConfig
from erniekit.models.weights import logical_tensors
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16
from erniekit.utils.errors import CheckpointError


def write(directory, tensors, config, max_shard_size="5GB"):
    """tensors: name -> (header dtype, array)."""
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(directory, plan, max_shard_size) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def read(directory):
    reader = Reader(directory)
    return {name: (reader.info(name).dtype, reader.read(name)) for name in reader.keys()}  # noqa: SIM118


def source(tmp_path, case, dtype="F32", change=None, max_shard_size="5GB", to_paddle=False):
    """A fixture in another dtype (router and correction bias stay), with tokenizer files."""
    fixture = read_fixture(case)
    arrays = load_file(fixture.path / "model.safetensors")
    if to_paddle:
        arrays = paddle_file_tensors(arrays, fixture.config)
    short = "BF16" if dtype == "U16" else dtype
    tensors = {}
    for name, value in arrays.items():
        fp32 = ".mlp.gate." in name or "moe_statics" in name
        tensors[name] = ("F32", value) if fp32 else (dtype, to_dtype(value, "F32", short))
    if change is not None:
        change(tensors)
    tmp_path.mkdir(exist_ok=True)
    directory = write(tmp_path / "source", tensors, fixture.config, max_shard_size)
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    (directory / "generation_config.json").write_text('{"max_new_tokens": 7}')
    return directory


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, (dtype, array) in left.items():
        assert right[name][0] == dtype and right[name][1].shape == array.shape, name
        assert right[name][1].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("case", CASES)
def test_pt_to_paddle_and_back_is_the_same_bits(case, dtype, tmp_path):
    directory = source(tmp_path, case, dtype)
    report = convert(directory, tmp_path / "paddle", "paddle")
    convert(tmp_path / "paddle", tmp_path / "pt", "pt", max_shard_size="20KB")
    assert report.num_files == 1 and len(list((tmp_path / "pt").glob("model-*.safetensors"))) > 1
    assert_same_bits(read(directory), read(tmp_path / "pt"))
    assert report.num_bytes == sum(array.nbytes for _, array in read(directory).values())


@pytest.mark.parametrize("case", CASES)
def test_paddle_files_are_those_of_the_published_rules(case, tmp_path):
    directory = source(tmp_path, case, max_shard_size="15KB")
    convert(directory, tmp_path / "paddle", "paddle")
    assert_same_bits(read(source(tmp_path / "b", case, to_paddle=True)), read(tmp_path / "paddle"))
    assert Reader(tmp_path / "paddle").metadata == {"format": "np"}


def test_uint16_paddle_files_become_bfloat16(tmp_path):
    directory = source(tmp_path, "moe_mtp", "U16", to_paddle=True)
    convert(directory, tmp_path / "pt", "pt")
    convert(tmp_path / "pt", tmp_path / "paddle", "paddle")
    expected = {name: ("BF16" if kind == "U16" else kind, a) for name, (kind, a) in read(directory).items()}
    assert_same_bits(expected, read(tmp_path / "paddle"))
    config = json.loads((tmp_path / "pt" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"  # what the source's config.json says


def test_nan_and_infinity_survive_and_are_named(tmp_path, caplog):
    def change(tensors):
        _, array = tensors["model.layers.0.self_attn.q_proj.weight"]
        array[0, :4] = [np.nan, np.inf, -np.inf, -0.0]

    directory = source(tmp_path, "dense_tied", "F16", change)
    convert(directory, tmp_path / "paddle", "paddle")
    assert "infinite values are written as they are: ernie.layers.0.self_attn.qkv_proj.weight." in caplog.text
    convert(tmp_path / "paddle", tmp_path / "pt", "pt")
    assert_same_bits(read(directory), read(tmp_path / "pt"))


def test_config_and_companions(tmp_path, monkeypatch):
    directory = source(tmp_path, "moe_mtp")
    (directory / "modeling_ernie4_5.py").write_text("remote code")
    said = []
    monkeypatch.setattr(module.log, "info", said.append)
    convert(directory, tmp_path / "out", "paddle")
    out = tmp_path / "out"
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_text() == (directory / name).read_text()
    assert not (out / "modeling_ernie4_5.py").exists() and any("modeling_ernie4_5.py" in line for line in said)
    assert ModelConfig.from_dir(out).num_nextn_predict_layers == 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    count = len(Reader(out).keys())
    assert any(f"{count} tensors" in line and "equal" in line for line in said)


def test_a_key_that_is_not_known_is_named_once(tmp_path, caplog):
    directory = source(tmp_path, "dense_tied")
    config = json.loads((directory / "config.json").read_text()) | {"my_note": 1}
    (directory / "config.json").write_text(json.dumps(config))
    convert(directory, tmp_path / "out", "paddle")
    assert caplog.text.count("my_note") == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["my_note"] == 1


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": 999999}'])
def test_a_wrong_generation_config_is_refused_before_weights_are_read(tmp_path, text, monkeypatch):
    directory = source(tmp_path, "dense_tied")
    (directory / "generation_config.json").write_text(text)
    monkeypatch.setattr(ModelReader, "read", None)
    with pytest.raises(CheckpointError, match=r"source/generation_config\.json: "):
        convert(directory, tmp_path / "out", "paddle")
    assert not (tmp_path / "out").exists()


def test_another_dtype(tmp_path):
    directory = source(tmp_path, "moe_tied")
    convert(directory, tmp_path / "out", "pt", dtype="bfloat16")
    written = read(tmp_path / "out")
    for name, (_, array) in read(directory).items():
        fp32 = ".mlp.gate." in name or "moe_statics" in name
        assert written[name][0] == ("F32" if fp32 else "BF16")
        np.testing.assert_array_equal(written[name][1], array if fp32 else fp32_to_bf16(array))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(tmp_path / "out", tmp_path / "wide", "pt", dtype="float32")
    for name, (dtype, array) in read(tmp_path / "wide").items():
        assert dtype == "F32"
        expected = written[name][1]
        np.testing.assert_array_equal(array, expected if expected.dtype == np.float32 else bf16_to_fp32(expected))


def test_mtp_tensors_are_kept_even_if_the_config_is_silent(tmp_path):
    directory = source(tmp_path, "moe_mtp")
    config = json.loads((directory / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (directory / "config.json").write_text(json.dumps(config))
    convert(directory, tmp_path / "paddle", "paddle")
    convert(tmp_path / "paddle", tmp_path / "pt", "pt")
    assert_same_bits(read(directory), read(tmp_path / "pt"))
    assert ModelConfig.from_dir(tmp_path / "pt").num_nextn_predict_layers == 0


MTP_PROJECTION = "model.mtp_linear_proj.0.weight"


def _transpose_mtp_projection(tensors):
    """As in the published ERNIE-4.5-300B-A47B-PT."""
    dtype, array = tensors[MTP_PROJECTION]
    tensors[MTP_PROJECTION] = (dtype, np.ascontiguousarray(array.T))


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_a_transposed_mtp_projection_is_read_and_written_as_it_should_be(tmp_path, format, silent):
    directory = source(tmp_path / "a", "moe_mtp", "BF16", _transpose_mtp_projection)
    expected = source(tmp_path / "b", "moe_mtp", "BF16")
    if silent:
        config = json.loads((directory / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
        (directory / "config.json").write_text(json.dumps(config))
    convert(directory, tmp_path / "out", format)
    convert(expected, tmp_path / "expected", format)
    assert_same_bits(read(tmp_path / "expected"), read(tmp_path / "out"))


def test_a_head_that_is_not_tied_after_all_stays_so(tmp_path):
    head = np.random.default_rng(0).standard_normal((160, 32)).astype(np.float32)
    directory = source(tmp_path, "dense_tied", change=lambda tensors: tensors.update({"lm_head.weight": ("F32", head)}))
    convert(directory, tmp_path / "out", "paddle")
    assert not ModelConfig.from_dir(tmp_path / "out").tie_word_embeddings
    np.testing.assert_array_equal(read(tmp_path / "out")["lm_head.weight"][1], head.T)


def test_unknown_tensors_are_listed_and_nothing_is_written(tmp_path):
    def change(tensors):
        tensors["model.vision.weight"] = tensors["extra.bias"] = ("F32", np.zeros(3, np.float32))

    directory = source(tmp_path, "dense_tied", change=change)
    with pytest.raises(CheckpointError, match=r"2 unexpected: model\.vision\.weight; extra\.bias"):
        convert(directory, tmp_path / "out", "paddle")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_refusals(tmp_path):
    directory = source(tmp_path, "dense_tied")
    with pytest.raises(CheckpointError, match="same directory"):
        convert(directory, tmp_path / "x" / ".." / "source", "paddle")
    with pytest.raises(CheckpointError, match="gguf"):
        convert(directory, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="int8"):
        convert(directory, tmp_path / "out", "pt", dtype="int8")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="adapter is an adapter: `erniekit export` merges it"):
        convert(tmp_path / "adapter", tmp_path / "out", "pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_parts_of_a_weight_may_be_of_different_types(tmp_path, format):
    """As where an adapter of q_proj and v_proj was merged in float32."""

    def change(tensors):
        for part in "qv":
            name = f"model.layers.0.self_attn.{part}_proj.weight"
            tensors[name] = ("F32", bf16_to_fp32(tensors[name][1]))

    expected = source(tmp_path / "a", "dense_tied", "BF16")
    convert(source(tmp_path / "b", "dense_tied", "BF16", change=change), tmp_path / "out", format)
    convert(expected, tmp_path / "expected", format)
    found = read(tmp_path / "out")
    for name, (dtype, array) in read(tmp_path / "expected").items():
        joined = any(f"layers.0.self_attn.{part}_proj.weight" in name for part in ("q", "k", "v", "qkv"))
        assert found[name][0] == ("F32" if joined else dtype)
        np.testing.assert_array_equal(found[name][1], bf16_to_fp32(array) if joined else array)


def test_a_write_gone_wrong_is_found(tmp_path, monkeypatch):
    directory = source(tmp_path, "dense_tied")
    real, calls = safetensors_write._write_all, []

    def write_all(file, data):
        calls.append(len(data))
        data = bytearray(data)
        if len(calls) == 5:
            data[7] ^= 1
        real(file, memoryview(data))

    monkeypatch.setattr(safetensors_write, "_write_all", write_all)
    with pytest.raises(CheckpointError, match="differs"):
        convert(directory, tmp_path / "out", "paddle")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_an_earlier_result(tmp_path, monkeypatch):
    directory = source(tmp_path, "dense_tied")
    convert(directory, tmp_path / "out", "paddle")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def write_all(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_write, "_write_all", write_all)
    with pytest.raises(CheckpointError, match=r"full.*these weights need"):
        convert(directory, tmp_path / "out", "paddle")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_memory_holds_about_two_tensors_whatever_the_model(tmp_path):
    config = {**read_fixture("dense_untied").config, "vocab_size": 8000, "num_hidden_layers": 12}
    model = ModelConfig.from_dict({**config, "hidden_size": 96, "intermediate_size": 512})
    config = model.to_dict("pt")
    rng = np.random.default_rng(0)
    names = {p.name: p.shape for logical in logical_tensors(model) for p in logical.pt}
    tensors = {name: ("F32", rng.standard_normal(shape, np.float32)) for name, shape in names.items()}
    total = sum(array.nbytes for _, array in tensors.values())
    largest = max(array.nbytes for _, array in tensors.values())
    directory = write(tmp_path / "source", tensors, config, max_shard_size="2MB")
    del tensors
    for format, origin in (("paddle", directory), ("pt", tmp_path / "paddle")):
        tracemalloc.start()
        convert(origin, tmp_path / format, format, max_shard_size="2MB")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert total > 4 * largest and peak < 2.2 * largest, (peak, largest, total)
