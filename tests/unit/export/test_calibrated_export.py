"""`erniekit export quantization_algorithm=...`: from the keys to a directory that is a model."""

import json
import shutil

import numpy as np
import paddle
import pytest
from support.adapters import attach_random
from support.tiny_directories import model_directory, write_lines
from support.vision_directories import vision_model_directory

from erniekit import config
from erniekit.build import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.export.export import export
from erniekit.quantize import layer_pass
from erniekit.quantize.calibrated import WORK_DIRECTORY
from erniekit.utils.errors import ConfigError, DataError

SENTENCES = [f"the {animal} saw {number} red balls in the garden" for animal in ("cat", "dog") for number in range(40)]
SIZES: dict[str, object] = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
# Less would make routers undecided, and more would let one other expert change everything.
SIZES["initializer_range"] = 0.08
CALIBRATION = ("quantization_calibration_samples", "quantization_calibration_length")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    records = [{"src": [sentence], "tgt": [sentence[::-1]]} for sentence in SENTENCES]
    return write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", records)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model"), kind="moe", **SIZES)


def keys(checkpoint, out, data, **changes):
    values = {
        "checkpoint": str(checkpoint),
        "output_dir": str(out),
        "quantization": "wint4",
        "quantization_algorithm": "gptq",
        "quantization_calibration_path": str(data),
        "quantization_calibration_samples": 6,
        "quantization_calibration_length": 128,
    } | changes
    return config.load(None, {key: value for key, value in values.items() if value is not None}, "export")


def logits(directory):
    ids = np.random.default_rng(3).integers(5, 60, (2, 40))
    with paddle.no_grad():
        return load_model(directory)(ids).numpy()


@pytest.mark.parametrize(
    ("quantization", "algorithm"), [("wint4", "gptq"), ("wint4", "awq"), ("w8a8", "smoothquant"), ("wint8", "gptq")]
)
def test_the_directory_is_a_model_near_the_checkpoint(checkpoint, tmp_path, data, quantization, algorithm):
    """Folds and codes fit together: with 4 bits the logits of random tokens differ by a third, with 8 by 3 %."""
    report = export(keys(checkpoint, tmp_path, data, quantization=quantization, quantization_algorithm=algorithm))
    exact, quantised = logits(checkpoint), logits(tmp_path / "export")
    error = np.linalg.norm(quantised - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < (0.5 if quantization == "wint4" else 0.05)
    assert report.algorithm == algorithm and report.calibration["rows"] == 6
    assert all(0 < loss.relative < (0.2 if quantization == "wint4" else 0.02) for loss in report.errors)
    assert sum(report.calibration["layers"][1]["expert_tokens"][0]) == 2 * report.calibration["tokens"]
    json.dumps(report.calibration)
    assert not (tmp_path / WORK_DIRECTORY).exists()


def test_an_adapter_is_merged_before_the_calibration(checkpoint, tmp_path, data):
    """The same bytes as from the merged model in fp32."""
    model = attach_random(load_model(checkpoint))
    save_adapter(model, tmp_path / "adapter")
    merged = {"quantization": None, "quantization_algorithm": None, "quantization_calibration_path": None}
    base = {"model_name_or_path": str(checkpoint), "tokenizer_name_or_path": str(checkpoint)}
    export(keys(tmp_path / "adapter", tmp_path / "merged", data, **base, **merged))
    export(keys(tmp_path / "adapter", tmp_path / "a", data, **base, quantization_algorithm="awq"))
    export(keys(tmp_path / "merged" / "export", tmp_path / "b", data, quantization_algorithm="awq"))
    files = [tmp_path / each / "export" / "model.safetensors" for each in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_interrupted_export_continues(checkpoint, tmp_path, data, monkeypatch, caplog):
    run, layers = layer_pass.LayerPass.run, []

    def once_killed(self, number):
        layers.append(number)
        if layers == [0, 1]:
            raise KeyboardInterrupt
        return run(self, number)

    monkeypatch.setattr(layer_pass.LayerPass, "run", once_killed)
    with pytest.raises(KeyboardInterrupt):
        export(keys(checkpoint, tmp_path, data))
    assert (tmp_path / WORK_DIRECTORY).exists() and not (tmp_path / "export").exists()
    uncalibrated = {"quantization_algorithm": None, "quantization_calibration_path": None}
    export(keys(checkpoint, tmp_path, data, **uncalibrated, overwrite_output_dir=True))
    assert "of an interrupted quantisation with calibration (" in caplog.text
    export(keys(checkpoint, tmp_path, data))
    assert layers == [0, 1, 1]
    monkeypatch.undo()
    export(keys(checkpoint, tmp_path / "whole", data))
    files = [path / "export" / "model.safetensors" for path in (tmp_path, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("changed", ["weights", "adapter"])
def test_layers_of_other_weights_are_not_taken(checkpoint, tmp_path, data, monkeypatch, caplog, changed):
    """Codes depend on every weight: also on those of an adapter, and on those that a fingerprint leaves out."""
    model, adapter, layers = load_model(checkpoint), tmp_path / "adapter", []
    save_model(model, tmp_path / "base")
    shutil.copy(checkpoint / "tokenizer.json", tmp_path / "base")
    save_adapter(attach_random(model), adapter)

    def killed(self, number):
        layers.append(number)
        raise KeyboardInterrupt

    def interrupted_export():
        base = {"model_name_or_path": str(tmp_path / "base"), "tokenizer_name_or_path": str(checkpoint)}
        with pytest.raises(KeyboardInterrupt):
            export(keys(adapter, tmp_path, data, **base, quantization_algorithm="rtn"))

    run = layer_pass.LayerPass.run
    monkeypatch.setattr(layer_pass.LayerPass, "run", lambda self, number: (killed if number else run)(self, number))
    interrupted_export()
    monkeypatch.setattr(layer_pass.LayerPass, "run", killed)
    if changed == "adapter":
        save_adapter(attach_random(load_model(checkpoint), alpha=8.0), adapter)
    else:
        model = load_model(tmp_path / "base")
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.set_value(2 * weight)
        save_model(model, tmp_path / "base")
    interrupted_export()
    assert layers == [1, 0]
    assert f"an interrupted quantisation with other settings ({changed})" in caplog.text


def test_ranges_of_inputs_that_a_file_keeps(checkpoint, tmp_path, data):
    """tensor_wise_fp8 of -Paddle files; plain rounding with calibration data."""
    changes = {"quantization": "fp8", "format": "paddle", "quantization_algorithm": None}
    with pytest.raises(ConfigError, match="set quantization_calibration_path"):
        export(keys(checkpoint, tmp_path, None, **changes))
    export(keys(checkpoint, tmp_path, data, **changes))
    reader = ModelReader(tmp_path / "export")
    assert "fp8" in reader.quantised
    exact, quantised = logits(checkpoint), logits(tmp_path / "export")
    assert np.linalg.norm(quantised - exact) < 0.2 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("quantization", "clip_search", "used"), [("wint4", True, True), ("wint4", False, False), ("w8a8", None, False)]
)
def test_data_that_rounding_does_not_use_is_said_to_be_of_no_use(
    checkpoint, tmp_path, data, caplog, quantization, clip_search, used
):
    """Where no scale is searched, plain rounding writes the same bytes with and without data."""
    changes = {"quantization": quantization, "quantization_clip_search": clip_search, "quantization_algorithm": None}
    found = {}
    for name, path in {"with": data, "without": None}.items():
        calibration = {} if path else dict.fromkeys(CALIBRATION)
        export(keys(checkpoint, tmp_path / name, path, **changes | calibration))
        found[name] = (tmp_path / name / "export" / "model.safetensors").read_bytes()
    assert (found["with"] != found["without"]) == used
    assert (f"rtn writes {quantization} with format: pt as it does without data" not in caplog.text) == used


def test_ranges_of_the_experts_of_pictures_need_pictures(tmp_path, data):
    """An error before the first layer."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": [64, 32]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = vision_model_directory(tmp_path / "model", weights=True, **sizes, **heads)
    changes = {"quantization": "fp8", "format": "paddle", "quantization_algorithm": None}
    with pytest.raises(DataError, match=r"no pictures in . rows, and .* inputs of ernie\.layers\.1\.mlp\.experts"):
        export(keys(model, tmp_path, data, **changes))
    assert not (tmp_path / WORK_DIRECTORY).exists()


def test_what_does_not_fit_is_refused_before_anything_is_read(checkpoint, tmp_path, data):
    with pytest.raises(ConfigError, match="smoothquant is for w8a8, and quantization is wint4: use gptq or awq or rtn"):
        keys(checkpoint, tmp_path, data, quantization_algorithm="smoothquant")
    with pytest.raises(ConfigError, match=r"awq is for .*, and quantization is fp8"):
        keys(checkpoint, tmp_path, data, quantization_algorithm="awq", quantization="fp8")
    with pytest.raises(ConfigError, match=r"quantization_calibration_path: .*gptq needs texts"):
        keys(checkpoint, tmp_path, None)
    with pytest.raises(DataError, match=r"quantization_calibration_path: .*absent.jsonl"):
        export(keys(checkpoint, tmp_path, tmp_path / "absent.jsonl"))
    assert not (tmp_path / "export").exists()
