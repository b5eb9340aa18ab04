"""Quantised directories hold the model's weights within each scheme's error, and everything else as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.adapters import attach_random
from support.quantised import quantisation, quantised_model, saved_model
from support.streaming import peak_bytes
from support.vision_directories import vision_model_directory

import erniekit
from erniekit.build import inference_options, prepare_model
from erniekit.checkpoint import dtypes, quantised_codecs, quantised_paddle, quantised_recognise
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.config import load
from erniekit.export import quantise_job
from erniekit.export.convert import convert
from erniekit.export.export import export_checkpoint
from erniekit.export.quantise import write_quantised
from erniekit.models.weights import Logical, Piece
from erniekit.precision.codes import full_range, quantise
from erniekit.precision.packing import pack_words
from erniekit.quantize.schemes import SCHEMES
from erniekit.utils.errors import CheckpointError, ConfigError

IDS = np.arange(20).reshape(2, 10) * 3 % 61
# |W' - W| / |W|: rounding of normal weights with 128 inputs to a scale, whose bounds quantize/codes tests measure.
BOUNDS = {"wint4": 0.13, "wint8": 0.01, "wint4/8": 0.13, "w8a8": 0.01, "fp8": 0.03, "w4a8": 0.13, "wint2": 0.36}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse, with multi-token prediction, and as many key heads as query heads: -Paddle files order them by head."""
    return saved_model(tmp_path_factory.mktemp("model") / "m", num_nextn_predict_layers=1, num_key_value_heads=4)


def weights_of(path: Path) -> dict[tuple[str, int | None], tuple[Logical, np.ndarray]]:
    reader = ModelReader(path, keep_mtp=True)
    return {(each.param, each.index): (each, reader.read(each, as_fp32=True)) for each in reader.logicals}


@pytest.mark.parametrize(("name", "format"), SCHEMES)
def test_weights_within_the_error_and_the_rest_unchanged(models: Path, tmp_path: Path, name: str, format: Any):
    report = quantised_model(models, tmp_path / "q", name, format)
    before, after = weights_of(models), weights_of(tmp_path / "q")
    quantised = {matrix.logical.param for matrix in report.scheme.every_matrix(ModelReader(models).config)}
    assert before.keys() == after.keys() and len(quantised) == 10
    for key, (_, weight) in before.items():
        if key[0] in quantised:
            lost = np.linalg.norm(after[key][1] - weight) / np.linalg.norm(weight)
            assert 1e-4 < lost < BOUNDS[name], key
        else:
            np.testing.assert_array_equal(after[key][1], weight)
    assert {error.name for error in report.errors} == {
        matrix.name for matrix in report.scheme.every_matrix(ModelReader(models).config)
    }
    assert all(0 < error.relative < BOUNDS[name] for error in report.errors)
    stored = Reader(tmp_path / "q")
    for error in report.errors:  # only as codes
        assert f"{error.name}.weight" not in stored or stored.info(f"{error.name}.weight").dtype in ("I8", "F8_E4M3")


def test_a_transposed_mtp_projection_is_written_as_it_should_be(models: Path, tmp_path: Path):
    """The published ERNIE-4.5-300B-A47B-PT has it so."""
    tensors = load_bits(models)
    name = "model.mtp_linear_proj.0.weight"
    expected = ModelReader(models).read_piece(Piece(name, tensors[name][1].shape, transposed=True))
    tensors[name] = (tensors[name][0], np.ascontiguousarray(tensors[name][1].T))
    shutil.copytree(models, tmp_path / "m", ignore=lambda *_: ["model.safetensors"])
    with Writer(tmp_path / "m", [(key, kind, bits.shape) for key, (kind, bits) in tensors.items()], "5GB") as writer:
        for key, (_, bits) in tensors.items():
            writer.write(key, bits)
    quantised_model(tmp_path / "m", tmp_path / "q", "wint4")
    written = Reader(tmp_path / "q")
    assert written.info(name).shape == expected.shape
    np.testing.assert_array_equal(written.read(name), expected)


def load_bits(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    reader = Reader(path)
    return {name: (reader.info(name).dtype, reader.read(name)) for name in reader.keys()}  # noqa: SIM118


def test_the_same_bytes_twice(models: Path, tmp_path: Path):
    for target in ("a", "b"):
        quantised_model(models, tmp_path / target, "wint4", search=True)
    one, other = ((tmp_path / target / "model.safetensors").read_bytes() for target in ("a", "b"))
    assert one == other


def test_a_tied_head_and_fp32_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The embeddings, which are the head, keep 16 bits; the router keeps fp32."""
    saved_model(tmp_path / "m", dtype="float32", tie_word_embeddings=True)
    quantised_model(tmp_path / "m", tmp_path / "q", "wint4")
    reader = Reader(tmp_path / "q")
    assert "lm_head.weight" not in reader and reader.info("model.embed_tokens.weight").dtype == "BF16"
    assert reader.info("model.layers.1.mlp.gate.weight").dtype == "F32"
    assert "are rounded from F32 to bfloat16" in caplog.text
    assert json.loads((tmp_path / "q" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_merged_adapter_is_quantised(tmp_path: Path):
    """As the merged model would be, weight by weight."""
    base = saved_model(tmp_path / "base", "dense", dtype="float32")
    model = erniekit.load_model(base)
    attach_random(model)
    save_adapter(model, tmp_path / "adapter")
    export_checkpoint(base, tmp_path / "merged", adapter_dir=tmp_path / "adapter", copy_tokenizer=False)
    quantised_model(tmp_path / "merged", tmp_path / "one", "wint8")
    wint8 = quantisation("wint8")
    export_checkpoint(
        base, tmp_path / "two", adapter_dir=tmp_path / "adapter", copy_tokenizer=False, quantisation=wint8
    )
    one, other = ((tmp_path / target / "model.safetensors").read_bytes() for target in ("one", "two"))
    assert one == other


@pytest.mark.parametrize("name", ["wint4", "fp8"])
def test_vision_and_language(tmp_path: Path, name: str):
    """Experts of both modalities are quantised; the vision transformer, the resampler and both routers are not."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": [64, 32]}
    vision_model_directory(tmp_path / "m", weights=True, **sizes)
    report = quantised_model(tmp_path / "m", tmp_path / "q", name, group=16 if name == "wint4" else None)
    assert {error.place.role for error in report.errors} >= {"attention", "experts", "vision_experts"}
    assert "transformers" not in report.scheme.readers  # which cannot stack experts of two widths
    before, after = weights_of(tmp_path / "m"), weights_of(tmp_path / "q")
    for key, (_, weight) in before.items():
        as_bf16 = dtypes.to_fp32(dtypes.convert(weight, "F32", "BF16"), "BF16")
        if "vision_model" in key[0] or "resampler" in key[0]:
            np.testing.assert_array_equal(after[key][1], as_bf16)
        if ".gate.weight" in key[0]:
            np.testing.assert_array_equal(after[key][1], weight)
    with pytest.raises(ConfigError, match="FastDeploy has no names"):
        quantised_model(tmp_path / "m", tmp_path / "p", "wint8", "paddle")


def test_sizes_that_no_engine_divides_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saved_model(tmp_path / "m", "dense", num_key_value_heads=2)  # 64 outputs of k_proj
    assert not quantised_model(tmp_path / "m", tmp_path / "q", "fp8").degrees.good
    assert "fp8: vLLM takes no file with these sizes" in caplog.text and "has 64 outputs of" in caplog.text


def test_converting_a_quantised_directory_writes_what_it_stands_for(models: Path, tmp_path: Path):
    quantised_model(models, tmp_path / "q", "wint8")
    convert(tmp_path / "q", tmp_path / "c", "paddle", dtype="float32")
    assert "quantization_config" not in (tmp_path / "c" / "config.json").read_text()
    converted = weights_of(tmp_path / "c")
    for key, (_, weight) in weights_of(tmp_path / "q").items():
        np.testing.assert_array_equal(converted[key][1], weight)
    with pytest.raises(CheckpointError, match="quantised already"):
        quantised_model(tmp_path / "q", tmp_path / "twice", "wint8")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("codec", [quantised_paddle.W4A8_DOWN, quantised_paddle.TENSOR_WISE_FP8])
def test_inputs_that_are_always_0_do_not_make_an_engine_divide_by_0(codec: quantised_codecs.Codec):
    codes, scales = quantise(np.ones((128, 128), np.float32), codec.spec)
    tensors = codec.stored(codes, scales, input_range=0.0)
    names = [name for name, _, _ in codec.plan("m", (128, 128))]
    assert tensors[names.index("m.activation_scale")] > 0


def test_a_file_that_keeps_ranges_of_inputs_needs_them(models: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"w4a8 with format: paddle: .*experts.0.up_gate_proj, .*calibration_path"):
        quantised_model(models, tmp_path / "q", "w4a8", "paddle", ranges=False)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, bad: float):
    """Whether they are quantised or not."""
    saved_model(tmp_path / "m", "dense", dtype="float32")
    reader = Reader(tmp_path / "m")
    tensors = {each: reader.read(each) for each in reader.keys()}  # noqa: SIM118
    tensors[f"{name}.weight"][3, 3] = bad
    with Writer(tmp_path / "m", [(each, *reader.info(each)) for each in tensors]) as writer:
        for each, tensor in tensors.items():
            writer.write(each, tensor)
    with pytest.raises(CheckpointError, match=rf"{name}.*: a weight is not finite"):
        quantised_model(tmp_path / "m", tmp_path / "q", "wint4")
    assert not (tmp_path / "q").exists()


def test_codes_that_are_packed_wrongly_are_not_kept(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One code in the form of the file is another one: found before it is written."""

    def off_by_one(codes: np.ndarray, bits: int) -> np.ndarray:
        words = pack_words(codes, bits)
        words[0, 0] ^= 1
        return words

    monkeypatch.setattr(quantised_codecs, "pack_words", off_by_one)
    with pytest.raises(AssertionError, match=r"q_proj: codes in the form of the file are read as others"):
        quantised_model(models, tmp_path / "q", "wint4")
    assert not (tmp_path / "q").exists()


def test_a_file_that_is_recognised_as_another_scheme_is_not_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reader takes a scale for that of other weights: what the file stands for is not what was written."""
    wrong = quantised_paddle.WeightOnly(full_range(8, 64))
    monkeypatch.setitem(quantised_recognise._FASTDEPLOY_ROWS, "wint8", (wrong, 1))
    with pytest.raises(AssertionError, match=r"qkv_proj: written as .*, and recognised as .*group=64"):
        quantised_model(models, tmp_path / "q", "wint8", "paddle")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_a_changed_bit_is_not_kept(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str):
    """Of a weight that is not quantised (-PT), and of codes (-Paddle)."""
    ending = "embed_tokens.weight" if format == "pt" else "0.mlp.down_proj.quant_weight"
    written = Writer.append

    def with_a_changed_bit(writer: Writer, name: str, tensor: np.ndarray) -> None:
        if name.endswith(ending):
            tensor = tensor.copy()
            tensor[-1, -1] ^= 1
        written(writer, name, tensor)

    monkeypatch.setattr(Writer, "append", with_a_changed_bit)
    with pytest.raises(CheckpointError, match=rf"{ending} read again from .* differs from what was written"):
        quantised_model(models, tmp_path / "q", "wint8", format)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("name", "format"), [("wint4", "pt"), ("w8a8", "pt"), ("fp8", "pt"), ("wint8", "paddle")])
def test_a_quantised_directory_with_the_config_json_of_its_source(models: Path, tmp_path: Path, name: str, format: Any):
    quantised_model(models, tmp_path / "q", name, format)
    shutil.copy(models / "config.json", tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"parts of quantised weights, which quantization_config in config\.json"):
        ModelReader(tmp_path / "q")


def test_a_quantised_directory_is_not_rounded_again(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """By the configuration of the training that it comes from; by compute_type it is, with a warning."""
    quantised_model(models, tmp_path / "q", "wint4")

    def logits(**keys: Any) -> np.ndarray:
        data = {"eval_dataset_path": "unused", "eval_dataset_type": "erniekit", "output_dir": "unused"}
        cfg = load(None, {**data, "checkpoint": str(tmp_path / "q"), **keys}, "eval")
        model = prepare_model(tmp_path / "q", inference_options(cfg)).build()
        with paddle.no_grad():
            return model(IDS).numpy()

    plain = logits()
    np.testing.assert_array_equal(logits(qat="wint4"), plain)
    assert "qat: wint4: no effect on weights that are quantised already" in caplog.text
    assert np.abs(logits(compute_type="wint4") - plain).max() > 1e-3
    assert "these weights are rounded a second time, to int4" in caplog.text


@pytest.mark.parametrize(("num_threads", "share"), [(1, 1 / 4), (4, 1 / 3)])
def test_a_few_weights_are_in_memory_at_a_time(tmp_path: Path, num_threads: int, share: float):
    """A part of the model, of which most are Python's objects for 24 layers; the largest matrix is a fiftieth, and each
    further thread has one with its codes and what is computed of it.
    """
    saved_model(tmp_path / "m", "dense", "float32", num_hidden_layers=24, intermediate_size=512)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size

    def export() -> None:
        write_quantised(tmp_path / "m", tmp_path / "q", "pt", quantisation("wint8"), "5GB", num_threads=num_threads)

    assert peak_bytes(export) < size * share


@pytest.mark.parametrize(("name", "format"), SCHEMES)
def test_the_same_bytes_by_several_threads(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: Any
):
    """Also where a weight is divided into many units, and these into many blocks; the errors are those of the whole."""
    lost = []
    for num_threads in (1, 3):
        target = tmp_path / str(num_threads)
        report = write_quantised(models, target, format, quantisation(name), "100KB", num_threads=num_threads)
        names = [matrix.name for matrix in report.scheme.every_matrix(ModelReader(models).config)]
        assert [error.name for error in report.errors][: len(names)] == names
        lost.append([(error.size, error.relative) for error in report.errors])
        monkeypatch.setattr(quantise_job, "_UNIT", 1 << 13)
        monkeypatch.setattr(quantise_job, "_BLOCK", 1 << 11)
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / num_threads).iterdir()} for num_threads in ("1", "3")
    )
    assert one == other and len(one) > 3
    np.testing.assert_allclose(lost[0], lost[1], rtol=1e-5)
