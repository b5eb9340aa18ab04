"""Models from directories and back: every layout, and what is said when tensors do not fit."""

import dataclasses
import errno
import json

import numpy as np
import paddle
import pytest
from parity.support import CASES, paddle_file_tensors, read_fixture
from safetensors.numpy import load_file, save_file
from support.tiny_models import tiny_model

from erniekit.build import load_model
from erniekit.checkpoint import safetensors_write
from erniekit.checkpoint.model_io import load_weights, read_config, save_model
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import export_tensors
from erniekit.utils import log
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16
from erniekit.utils.errors import CheckpointError


def checkpoint(tmp_path, case, change=None, config=None, to_paddle=False):
    """A copy of a fixture with changed tensors or configuration; returns its directory and tensors."""
    fixture = read_fixture(case)
    tensors = load_file(fixture.path / "model.safetensors")
    if to_paddle:
        tensors = paddle_file_tensors(tensors, fixture.config)
    if change is not None:
        change(tensors)
    tmp_path.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**fixture.config, **(config or {})}))
    return tmp_path, tensors


def parameters(model):
    return dict(export_tensors(model))


def said(monkeypatch):
    lines = []
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


@pytest.mark.parametrize("to_paddle", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_file_arrives(case, to_paddle, tmp_path):
    directory, _ = checkpoint(tmp_path, case, to_paddle=to_paddle)
    model = load_model(directory)
    assert not model.training and isinstance(model.config, ModelConfig)
    expected = load_file(read_fixture(case).path / "model.safetensors")
    exported = parameters(model)
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_saved_model_reads_back_equal(format, tmp_path):
    model = load_model(read_fixture("moe_untied").path)
    save_model(model, tmp_path / "out", format=format, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype" if format == "pt" else "dtype"] == "float32"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    again = load_model(str(tmp_path / "out"))
    assert again.config == dataclasses.replace(model.config, dtype="float32", extra=again.config.extra)
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[name], value)


@pytest.mark.parametrize(("dtype", "header"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_saving_in_a_short_type_keeps_the_router_in_fp32(dtype, header, tmp_path):
    model = load_model(read_fixture("moe_tied").path)
    save_model(model, tmp_path, dtype=dtype)
    reader = Reader(tmp_path)
    kept = {name for name in reader.keys() if reader.info(name).dtype == "F32"}  # noqa: SIM118
    assert kept == {name for name in reader.keys() if ".mlp.gate." in name or "moe_statics" in name}  # noqa: SIM118
    assert {reader.info(name).dtype for name in set(reader.keys()) - kept} == {header}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    # What load_model rounds to is what the file holds.
    rounded = parameters(load_model(read_fixture("moe_tied").path, dtype=dtype))
    for name, value in rounded.items():
        np.testing.assert_array_equal(reader.read(name, as_fp32=True), value)


def test_loading_in_bfloat16_on_cpu_rounds_and_says_so(monkeypatch):
    lines = said(monkeypatch)
    path = read_fixture("moe_tied").path
    exact, rounded = parameters(load_model(path)), parameters(load_model(path, dtype="bfloat16"))
    assert len(lines) == 1 and "bfloat16 on CPU" in lines[0]
    for name, value in exact.items():
        fp32 = ".mlp.gate." in name or "moe_statics" in name
        np.testing.assert_array_equal(rounded[name], value if fp32 else bf16_to_fp32(fp32_to_bf16(value)))
    with pytest.raises(CheckpointError, match="int4"):
        load_model(path, dtype="int4")


def test_a_loaded_model_can_be_trained():
    model = load_model(read_fixture("moe_mtp").path)
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    before = model.model.norm.weight.numpy().copy()
    model.train()
    model(paddle.to_tensor([[3, 4, 5]])).sum().backward()
    optimizer.step()
    assert not np.array_equal(model.model.norm.weight.numpy(), before)


def test_older_paddle_files_hold_bfloat16_as_uint16(tmp_path):
    directory, tensors = checkpoint(tmp_path, "dense_untied", to_paddle=True)
    plan = [(name, "U16", value.shape) for name, value in tensors.items()]
    with Writer(directory, plan) as writer:
        for name, value in tensors.items():
            writer.write(name, fp32_to_bf16(value))
    exact = parameters(load_model(read_fixture("dense_untied").path))
    for name, value in parameters(load_model(directory)).items():
        np.testing.assert_array_equal(value, bf16_to_fp32(fp32_to_bf16(exact[name])))


def test_parts_of_a_projection_may_have_different_dtypes(tmp_path):
    directory, tensors = checkpoint(tmp_path, "dense_tied")
    name = "model.layers.0.self_attn.k_proj.weight"
    half = tensors[name].astype(np.float16)
    save_file({**tensors, name: half}, directory / "model.safetensors")
    np.testing.assert_array_equal(parameters(load_model(directory))[name], half.astype(np.float32))


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(2, np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((161, 32), np.float32)

    directory, _ = checkpoint(tmp_path, "dense_tied", change)
    with pytest.raises(CheckpointError) as error:
        load_model(directory)
    for words in [
        str(directory),
        "2 missing",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "1 unexpected: model.layers.9.mlp.up_proj.weight",
        "model.embed_tokens.weight [161, 32], expected [160, 32]",
    ]:
        assert words in str(error.value)


def test_whole_numbers_are_no_weights(tmp_path):
    """Also to commands that copy bits: nothing could load what they would write."""

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int64)

    directory, _ = checkpoint(tmp_path, "dense_tied", change)
    expected = r"(?s)1 of a type that is not floating: model\.norm\.weight I64.*Weights are F32"
    with pytest.raises(CheckpointError, match=expected):
        read_config(directory)


def test_a_tied_head_that_repeats_the_embeddings_is_fine(tmp_path, monkeypatch):
    def change(tensors):
        tensors["lm_head.weight"] = tensors[next(name for name in tensors if "embed_tokens" in name)].copy()

    for to_paddle in (False, True):
        lines = said(monkeypatch)
        directory, _ = checkpoint(tmp_path / str(to_paddle), "dense_tied", change, to_paddle=to_paddle)
        model = load_model(directory)
        assert model.config.tie_word_embeddings and len(lines) == 1 and "repeats" in lines[0]


def test_a_tied_head_that_differs_is_not_tied_as_in_transformers(tmp_path, monkeypatch):
    head = np.random.default_rng(0).standard_normal((160, 32)).astype(np.float32)
    directory, _ = checkpoint(tmp_path, "dense_tied", lambda tensors: tensors.update({"lm_head.weight": head}))
    lines = said(monkeypatch)
    model = load_model(directory)
    assert not model.config.tie_word_embeddings and len(lines) == 1 and "not tied" in lines[0]
    np.testing.assert_array_equal(parameters(model)["lm_head.weight"], head)
    assert read_config(directory) == model.config
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        load_weights(CausalLM(ModelConfig.from_dir(directory)), directory)


def test_an_untied_model_needs_its_head(tmp_path):
    directory, _ = checkpoint(tmp_path, "dense_untied", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="tie_word_embeddings true"):
        load_model(directory)


def frequencies(theta=10000.0, head_dim=8):  # of the fixture's config.json
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)


@pytest.mark.parametrize("to_paddle", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stored_rotary_frequencies_are_left_out_with_a_line(tmp_path, monkeypatch, to_paddle, dtype):
    def change(tensors):
        layers = "ernie.layers" if to_paddle else "model.layers"
        tensors[f"{layers}.0.self_attn.rotary_emb.inv_freq"] = frequencies().astype(dtype)
        tensors["rotary_emb.inv_freq"] = frequencies()

    lines = said(monkeypatch)
    directory, _ = checkpoint(tmp_path, "dense_untied", change, to_paddle=to_paddle)
    load_model(directory)
    assert len(lines) == 1 and "2 tensors of rotary frequencies left out" in lines[0]


@pytest.mark.parametrize(
    "stored", [frequencies(500000.0), frequencies(10100.0), frequencies(head_dim=16), np.arange(4)]
)
def test_rotary_frequencies_of_another_base_than_that_of_config_json_are_named(tmp_path, monkeypatch, stored):
    lines = said(monkeypatch)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    directory, _ = checkpoint(tmp_path, "dense_untied", lambda tensors: tensors.update({name: stored}))
    load_model(directory)
    assert len(lines) == 1 and "although not those of config.json" in lines[0] and "layers.0.self_attn" in lines[0]


@pytest.mark.parametrize(("factor", "said_of_it"), [(4, "left out"), (1, "although not")])
def test_stored_rotary_frequencies_are_compared_with_scaled_ones(tmp_path, monkeypatch, factor, said_of_it):
    config = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    lines = said(monkeypatch)
    directory, _ = checkpoint(
        tmp_path,
        "dense_untied",
        lambda tensors: tensors.update({"rotary_emb.inv_freq": frequencies() / factor}),
        config,
    )
    load_model(directory)
    assert len(lines) == 1 and said_of_it in lines[0]


def test_the_advice_about_correction_biases_and_fused_experts(tmp_path):
    def without_biases(tensors):
        for name in [name for name in tensors if "correction_bias" in name]:
            del tensors[name]

    def fused(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            layer, _, rest = name.partition(".experts.")
            if rest.endswith("down_proj.weight"):
                tensors[f"{layer}.experts.down_proj"] = tensors[name][None]
            del tensors[name]

    for number, (change, advice) in enumerate(((without_biases, "correction biases of"), (fused, "fused into one"))):
        directory, _ = checkpoint(tmp_path / str(number), "moe_untied", change)
        with pytest.raises(CheckpointError, match=advice) as error:
            load_model(directory)
        assert "different models" not in str(error.value)


def test_mtp_is_left_out_or_missing_with_a_line(tmp_path, monkeypatch):
    lines = said(monkeypatch)
    directory, _ = checkpoint(tmp_path / "a", "moe_mtp", config={"num_nextn_predict_layers": 0})
    model = load_model(directory)
    assert len(lines) == 1 and "12 multi-token-prediction tensors left out" in lines[0]
    assert not any("mtp_" in name for name in parameters(model))

    def change(tensors):  # as transformers saves
        for name in [name for name in tensors if "mtp_" in name]:
            del tensors[name]

    lines = said(monkeypatch)
    directory, _ = checkpoint(tmp_path / "b", "moe_mtp", change)
    assert load_model(directory).config.num_nextn_predict_layers == 0 and len(lines) == 1
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers to 0"):
        load_weights(CausalLM(ModelConfig.from_dir(directory)), directory)


def test_a_transposed_mtp_projection_is_read(tmp_path, monkeypatch):
    """The published ERNIE-4.5-300B-A47B-PT has it so."""

    def change(tensors):
        name = "model.mtp_linear_proj.0.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    lines = said(monkeypatch)
    directory, _ = checkpoint(tmp_path, "moe_mtp", change)
    found, expected = parameters(load_model(directory)), parameters(load_model(read_fixture("moe_mtp").path))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert any("model.mtp_linear_proj.0.weight is transposed" in line for line in lines)


def test_load_weights_fills_a_model_in_place():
    path = read_fixture("moe_untied").path
    model = CausalLM(ModelConfig.from_dir(path))
    load_weights(model, path)
    for name, value in load_file(path / "model.safetensors").items():
        np.testing.assert_array_equal(parameters(model)[name], value)


def test_a_directory_without_an_adapter_is_named():
    with pytest.raises(CheckpointError, match="x holds no adapter"):
        load_model(read_fixture("dense_tied").path, adapter="x")


def test_save_keeps_an_existing_generation_config_and_refuses_unknown_formats(tmp_path):
    model = load_model(read_fixture("dense_tied").path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.8}')
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_p": 0.8}
    with pytest.raises(CheckpointError, match="onnx"):
        save_model(model, tmp_path, format="onnx")


def test_a_path_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model("dense"), "~/m")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    load_model("~/m")


def test_a_full_disk_keeps_the_earlier_model(tmp_path, monkeypatch):
    model = load_model(read_fixture("dense_tied").path)
    save_model(model, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    model.model.norm.weight.set_value(paddle.zeros_like(model.model.norm.weight))
    real, written = safetensors_write._write_all, []

    def write_all(file, data):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(safetensors_write, "_write_all", write_all)
    with pytest.raises(CheckpointError, match="is full"):
        save_model(model, tmp_path / "m")
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_float16_overflow_names_the_tensor(tmp_path):
    model = load_model(read_fixture("dense_tied").path)
    model.model.norm.weight.set_value(paddle.full_like(model.model.norm.weight, 1e6))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float16"):
        save_model(model, tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place",
    [
        {"rope_theta": 100.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 100},
        {"rope_scaling": {"rope_theta": 100.0}, "rope_theta": 500000.0, "rope_parameters": {"rope_theta": 7.0}},
    ],
)
def test_the_rotary_base_counts_wherever_config_json_has_it(tmp_path, place):
    """The places and their order are those of transformers 5."""
    model = tiny_model("dense", rope_theta=100.0)
    save_model(model, tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    bare = {key: value for key, value in content.items() if not key.startswith("rope_")}
    file.write_text(json.dumps(bare | place))
    ids = np.arange(40).reshape(1, 40) % 61
    logits = load_model(tmp_path)(ids).numpy()
    np.testing.assert_array_equal(logits, model(ids).numpy())
    file.write_text(json.dumps(bare))
    assert np.abs(load_model(tmp_path)(ids).numpy() - logits).max() > 0.1  # the default base is another model


def test_end_tokens_of_generation_config_are_loaded_and_saved(tmp_path):
    save_model(tiny_model("dense"), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [2, 9], "pad_token_id": 5}')
    model = load_model(tmp_path / "a")
    assert (model.end_ids, model.fill_id) == ((2, 9), 5)
    save_model(model, tmp_path / "b")
    assert load_model(tmp_path / "b").end_ids == (2, 9)
    for text, ends in [('{"top_p": 0.8}', (2,)), ('{"eos_token_id": null}', ()), ('{"eos_token_id": 7}', (7,))]:
        (tmp_path / "a" / "generation_config.json").write_text(text)
        assert load_model(tmp_path / "a").end_ids == ends
    for text, words in [('{"eos_token_id": [61]}', "eos_token_id: 61 is not a token"), ("[2]", "one JSON object")]:
        (tmp_path / "a" / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{words}"):
            load_model(tmp_path / "a")
