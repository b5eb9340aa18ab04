"""`erniekit export` with quantization=: the report beside the weights, and the evaluation before and after."""

import json

import numpy as np
import pytest
from support.tiny_directories import model_directory, write_lines
from support.tiny_models import tiny_model

from erniekit import config
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.evaluate.quantised import RouterWatch, agreement, export_and_report
from erniekit.evaluate.run import evaluate
from erniekit.quantize.report import PICTURE_FILE, REPORT_FILE
from erniekit.utils.errors import UserError

DATA = [{"src": [f"{a}加{b}等于几？"], "tgt": [str(a + b)]} for a in range(4) for b in range(3)]
SIZES = {"kind": "moe", "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model"), **SIZES)


def cfg_for(model, out, command="export", **keys):
    data = write_lines(out / "data.jsonl", DATA)
    given = {
        "checkpoint": str(model),
        "output_dir": str(out),
        "eval_dataset_path": str(data),
        "eval_dataset_type": "erniekit",
        "max_seq_len": 64,
        "quantization": "wint4",
        "predict_with_generate": True,
        "max_new_tokens": 2,
        "max_evaluate_steps": 3,
        "temperature": 0,
    }
    return config.load(None, given | keys, command)


def test_the_report_has_errors_and_what_an_evaluation_of_the_directory_finds(model, tmp_path):
    export_and_report(cfg_for(model, tmp_path, quantization_eval=True))
    exported = tmp_path / "export"
    report = json.loads((exported / REPORT_FILE).read_text())
    assert (exported / PICTURE_FILE).is_file()
    kinds = report["error"]["by_kind"]
    assert kinds.keys() == {"attention", "mlp", "shared_experts", "experts"}
    assert all(0.05 < error < 0.2 for error in kinds.values())  # 4 bits in groups of 32: some 10 %
    stored, plain = ModelReader(exported), ModelReader(model)
    squares = np.zeros(2)
    for logical, before in zip(stored.logicals, plain.logicals, strict=True):
        if stored.dtype_of(logical) == "F32" and not logical.keep_fp32:
            w, read = (reader.read(one, as_fp32=True) for reader, one in ((plain, before), (stored, logical)))
            squares += [np.square(read - w).sum(), np.square(w).sum()]
    assert report["error"]["all"] == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-4)
    size = sum(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert report["bytes"]["quantised"] == pytest.approx(size, abs=20000)  # the header
    assert 4.5 <= report["bits_per_weight"]["quantised"] < 4.6  # bf16 scales of 32, and weight_shape
    found = evaluate(cfg_for(exported, tmp_path, "eval", quantization="none"))
    assert report["evaluation"]["after"] == {
        name: value for name, value in found.items() if name not in ("model", "seconds")
    }
    before = evaluate(cfg_for(model, tmp_path, "eval", quantization="none"))
    assert report["evaluation"]["before"]["loss"] == before["loss"] != found["loss"]
    assert report["routing"]["by_layer"].keys() == {"1"} and 0 < report["routing"]["unchanged"] < 1
    assert report["routing"]["tokens"] > before["num_tokens"]


def test_prediction_blocks_that_config_json_does_not_mention_are_counted(tmp_path):
    model = model_directory(tmp_path, **SIZES, num_nextn_predict_layers=1)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 0}))
    export_and_report(cfg_for(model, tmp_path, quantization="wint8"))
    report = json.loads((tmp_path / "export" / REPORT_FILE).read_text())
    read = ModelReader(model, keep_mtp=True)
    assert report["weights"]["model"] == sum(np.prod(logical.shape) for logical in read.logicals)


def test_another_export_removes_the_report(model, tmp_path):
    export_and_report(cfg_for(model, tmp_path))
    assert "evaluation" not in json.loads((tmp_path / "export" / REPORT_FILE).read_text())
    export_and_report(cfg_for(model, tmp_path, quantization="none"))
    assert not (tmp_path / "export" / REPORT_FILE).exists() and not (tmp_path / "export" / PICTURE_FILE).exists()


def test_data_that_cannot_be_read_is_found_before_anything_is_written(model, tmp_path):
    cfg = cfg_for(model, tmp_path, quantization_eval=True)
    (tmp_path / "data.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"data\.jsonl"):
        export_and_report(cfg)
    assert not (tmp_path / "export").exists()


def watched(model, seed):
    watch = RouterWatch()
    tokens = np.random.default_rng(seed).integers(3, 60, size=(1, 40))
    with watch.on(model):
        import paddle

        model(paddle.to_tensor(tokens))
    model(paddle.to_tensor(tokens))  # not watched any more
    return watch


def test_the_same_model_routes_alike_and_another_bias_does_not():
    model = tiny_model("moe")
    first = watched(model, 0)
    assert [array.shape for array in first.choices["1"]] == [(40, 2)]
    same = agreement(first, watched(model, 0))
    assert same == {"tokens": 40, "unchanged": 1.0, "kept": 1.0, "by_layer": {"1": 1.0}}
    model.model.layers[1].mlp.correction_bias[0, :] = np.array([9.0, 9.0, 0.0, 0.0], np.float32)
    other = watched(model, 0)
    assert {tuple(row) for row in other.choices["1"][0].tolist()} == {(0, 1)}
    expected = (first.choices["1"][0] < 2).all(axis=1).mean()
    found = agreement(first, other)
    assert found["unchanged"] == pytest.approx(expected) and found["kept"] == pytest.approx(
        (first.choices["1"][0] < 2).mean()
    )
    assert agreement(RouterWatch(), RouterWatch()) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quantization": "wint2"}, "no engine reads such a file in the layout format: pt"),
        ({"quantization_group_size": 48}, "do not divide into groups of 48"),
        ({"quantization_calibration_path": "missing.jsonl"}, "quantization_calibration_path: there is no file"),
        ({"quantization": "fp8", "format": "paddle"}, "which only calibration or training for the scheme measures"),
        ({"checkpoint": "quantised"}, "quantised already"),
        ({"output_dir": "taken"}, "holds another model"),
    ],
)
def test_what_stops_an_export_is_found_before_the_evaluation(model, tmp_path, monkeypatch, wrong, said):
    if "checkpoint" in wrong or "output_dir" in wrong:
        export_and_report(cfg_for(model, tmp_path, quantization="wint8"))
    if "checkpoint" in wrong:
        wrong = {"checkpoint": str(tmp_path / "export"), "output_dir": str(tmp_path / "out")}
    elif "output_dir" in wrong:
        (tmp_path / "export" / ".erniekit_source.json").unlink()
        wrong = {}
    monkeypatch.setattr("erniekit.evaluate.quantised.measure", lambda *given: pytest.fail("it was evaluated"))
    with pytest.raises(UserError, match=said):
        export_and_report(cfg_for(model, tmp_path, quantization_eval=True, **wrong))
