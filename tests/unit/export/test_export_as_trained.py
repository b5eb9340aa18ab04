"""What `erniekit export` writes after training for a scheme is what the last step multiplied by, bit for bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.equality import ROOT

from erniekit import config, lora
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.export.export import export
from erniekit.models.config import ModelConfig
from erniekit.models.products import products
from erniekit.parallel.mesh import Mesh
from erniekit.quantize.schemes import Options, scheme_for
from erniekit.quantize.trained import say_if_groups_differ, say_if_qat_differs
from erniekit.training.build import build_run
from erniekit.training.trainer import Trainer
from erniekit.utils.errors import ConfigError

# qat -> the export's scheme and layout, and keys of both commands.
EXPORTS = {
    "wint4": ("wint4", "pt", {}),
    "fp8_static": ("fp8", "paddle", {"apply_online_actscale_step": 1}),
    "w8a8": ("w8a8", "pt", {}),
    "fp8": ("fp8", "pt", {}),
    "wint8": ("wint8", "pt", {}),
    "wint4/8": ("wint4/8", "pt", {"quantization_group_size": 64}),
    "w4a8": ("w4a8", "paddle", {}),
}
QUICK = ("wint4", "fp8_static")


def keys_of(tmp_path: Path, qat: str, **changes: object) -> dict[str, object]:
    """Two steps of a mixture of experts whose sizes FastDeploy's kernels take."""
    source = tmp_path / "model"
    if not source.exists():
        shutil.copytree(ROOT / "examples" / "models" / "tiny-moe", source)
        sizes = {"num_hidden_layers": 2, "moe_layer_end_index": 1, "num_nextn_predict_layers": 0}
        settings = json.loads((source / "config.json").read_text()) | sizes
        (source / "config.json").write_text(json.dumps(settings))
    return {
        "model_name_or_path": str(source),
        "continue_training": False,
        "train_dataset_type": "erniekit",
        "train_dataset_path": str(ROOT / "examples" / "data" / "sft-train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_seq_len": 64,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "compute_type": "fp32",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "qat": qat,
    } | changes


def check(tmp_path: Path, qat: str, more: dict[str, object] | None = None) -> None:
    scheme, layout, changes = EXPORTS[qat]
    changes = changes | (more or {})
    given = keys_of(tmp_path, qat, **changes)
    run = build_run(config.load(None, given, "train"), Mesh.single())
    Trainer(run, []).fit()
    cfg = config.load(None, given | {"quantization": scheme, "format": layout}, "export")
    assert f"qat: {qat}: scales are those of the training (quantization_clip_search: False)" in cfg.notes
    export(cfg)
    exported = tmp_path / "out" / "export"
    reader, compared = ModelReader(exported), 0
    expected = {name: product.dense(projection.weight) for name, (projection, product) in products(run.model).items()}
    for logical in reader.logicals:
        if logical.param in expected:
            dense = expected[logical.param]
            found = reader.read(logical, as_fp32=True)
            np.testing.assert_array_equal(
                found, dense if logical.index is None else dense[logical.index], logical.param
            )
            compared += 1
    assert compared == 2 * 2 + 2 + 2 + 2 * 8  # attention, a dense layer, shared and routed experts
    _check_ranges(run.model, exported, 448.0 if qat == "fp8_static" else 1.0)


def _check_ranges(model, exported: Path, largest: float) -> None:
    """The file's activation scales are the moved ranges; experts without tokens have the largest of their layer."""
    reader = Reader(exported)
    stored = {name: reader.read(name) for name in reader.keys() if name.endswith(".activation_scale")}  # noqa: SIM118
    moving = {name: product for name, (_, product) in products(model).items() if product.moving is not None}
    assert len(stored) == sum(product.range.shape[0] for product in moving.values())
    values = {float(value.item()) for value in stored.values()}
    for name, product in moving.items():
        ranges = product.range.numpy()
        assert ranges.max() > 0, name
        for value in np.where(ranges > 0, ranges, ranges.max()):
            assert float(np.float32(value) / np.float32(largest)) in values, name


@pytest.mark.parametrize("qat", QUICK)
def test_files_hold_what_was_trained(tmp_path: Path, qat: str):
    check(tmp_path, qat)


@pytest.mark.slow
@pytest.mark.parametrize("qat", ["w8a8", "fp8_static"])
def test_so_it_is_with_16_bit_weights(tmp_path: Path, qat: str):
    """As on a GPU: weights in bf16, with fp32 masters; what is quantised are the weights as they are saved."""
    check(tmp_path, qat, {"compute_type": "bf16", "emulate_precision": True})


@pytest.mark.slow
def test_a_merged_adapter_is_what_was_trained_but_for_the_order_of_sums(tmp_path: Path):
    """W + s A B is summed by numpy in an export and by Paddle in training: a weight that lies near the border of two
    codes may get the other one. At most 1 of 1,000 does.
    """
    plain = keys_of(tmp_path, "none")
    Trainer(build_run(config.load(None, plain, "train"), Mesh.single()), []).fit()
    given = plain | {"model_name_or_path": str(tmp_path / "out"), "continue_training": True, "qat": "w8a8"}
    given |= {"fine_tuning": "LoRA", "output_dir": str(tmp_path / "lora")}
    run = build_run(config.load(None, given, "train"), Mesh.single())
    Trainer(run, []).fit()
    export(config.load(None, given | {"quantization": "w8a8"}, "export"))
    reader, differ, total = ModelReader(tmp_path / "lora" / "export"), 0, 0
    expected = {
        f"{name}.weight": projection.product.dense(adapter.added(projection.weight).detach())
        for name, projection, adapter in lora.adapters(run.model)
    }
    for logical in reader.logicals:
        if logical.param in expected:
            dense = expected[logical.param] if logical.index is None else expected[logical.param][logical.index]
            found = reader.read(logical, as_fp32=True)
            np.testing.assert_allclose(found, dense, atol=0.02 * np.abs(dense).max(), err_msg=logical.param)
            differ, total = differ + int((found != dense).sum()), total + found.size
    assert total > 100_000 and differ <= total / 1000


@pytest.mark.slow
@pytest.mark.parametrize("qat", [qat for qat in EXPORTS if qat not in QUICK])
def test_so_it_is_with_every_scheme(tmp_path: Path, qat: str):
    check(tmp_path, qat)


def test_notes_say_where_an_export_is_not_what_was_trained(tmp_path: Path):
    def notes(**changes: object) -> tuple[str, ...]:
        return config.load(None, keys_of(tmp_path, "w8a8") | changes, "export").notes

    assert (
        "qat: w8a8: exported in 16 bits; quantization: w8a8 with format: pt writes the codes of the training" in notes()
    )
    other = "qat: w8a8: exported in wint4 with format: pt; quantization: w8a8 with format: pt writes the codes of the"
    assert any(note.startswith(other) for note in notes(quantization="wint4"))
    static = notes(qat="fp8_static", quantization="fp8", format="paddle", apply_hadamard=False)
    assert any("FastDeploy rotates by 32, so the codes are not those of the training" in note for note in static)
    assert any(note.startswith("apply_hadamard: no effect: `export` reads qat alone") for note in static)
    searched = notes(quantization="w8a8", quantization_clip_search=True)
    assert "quantization_clip_search: True: the codes are not those of the training (qat: w8a8)" in searched
    calibrated = notes(quantization="w8a8", quantization_calibration_path="texts.txt")
    said = "quantization_calibration_path: codes are calibrated, not those of the training (qat: w8a8)"
    assert said in calibrated and not any("scales are those of the training" in note for note in calibrated)


def test_static_ranges_come_from_training_alone(tmp_path: Path):
    given = keys_of(tmp_path, "none")
    run = build_run(config.load(None, given, "train"), Mesh.single())
    Trainer(run, []).fit()
    cfg = config.load(None, given | {"qat": "fp8_static", "quantization": "fp8", "format": "paddle"}, "export")
    with pytest.raises(
        ConfigError, match=r"the largest magnitude of the inputs of .*, which only calibration or training"
    ):
        export(cfg)
    data = {"quantization_calibration_path": given["train_dataset_path"], "quantization_calibration_samples": 2}
    data |= {"quantization_calibration_length": 64, "quantization_algorithm": "gptq", "overwrite_output_dir": True}
    asked = export(config.load(None, given | data | {"qat": "wint4", "quantization": "wint4"}, "export"))
    assert asked.algorithm == "gptq", "calibration that is asked for is done, whatever the model was trained for"


@pytest.mark.parametrize(("trained", "exported"), [("w8a8", "none"), ("none", "wint4"), ("w8a8", "w8a8")])
def test_a_model_that_was_trained_otherwise_is_a_warning(tmp_path: Path, caplog, trained: str, exported: str):
    (tmp_path / "config.yaml").write_text(f"qat: {trained}\n")
    say_if_qat_differs(tmp_path, exported)
    assert (f"trained with qat: {trained}, and exported with qat: {exported}" in caplog.text) == (trained != exported)
    assert ("Set qat" in caplog.text) == (trained != exported)
    say_if_qat_differs(tmp_path / "without", "w8a8")


@pytest.mark.parametrize(("trained", "exported"), [("null", 32), ("32", None), ("null", 128), ("128", None)])
def test_other_groups_than_those_of_the_training_are_a_warning(tmp_path: Path, caplog, trained: str, exported: int):
    """128 and null are the same groups of this model."""
    model = ModelConfig.from_dir(ROOT / "examples" / "models" / "tiny-moe")
    (tmp_path / "config.yaml").write_text(f"qat: wint4\nquantization_group_size: {trained}\n")
    say_if_groups_differ(tmp_path, "wint4", scheme_for("wint4", "pt", model, Options(exported)), model)
    assert (f"Set quantization_group_size: {trained}" in caplog.text) == ("32" in (trained, str(exported)))
