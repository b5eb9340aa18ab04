"""What a training for a scheme (qat) says of the export of its codes."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.quantised import SIZES
from support.tiny_directories import model_directory, write_lines
from support.tiny_sizes import KINDS
from support.vision_directories import vision_config

from erniekit import config
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.cli import check, plan
from erniekit.models.config import ModelConfig
from erniekit.parallel.mesh import Mesh
from erniekit.quantize.schemes import scheme_for
from erniekit.quantize.trained import AsTrained, check_export
from erniekit.training.build import build_run
from erniekit.utils import log
from erniekit.utils.errors import ConfigError


def warnings(kind: str, qat: str, group: int | None = None, **sizes: int) -> list[str]:
    with log.captured() as lines:
        check_export(qat, ModelConfig.from_dict(KINDS[kind] | SIZES | sizes), group)
    assert all(is_warning for is_warning, _ in lines)
    return [text for _, text in lines]


@pytest.mark.parametrize(
    ("kind", "qat", "sizes", "expected"),
    [
        (
            "dense",
            "fp8",
            {"hidden_size": 160},
            "quantization=fp8 format=pt` will refuse .*: 160 is not a multiple of 128",
        ),
        ("dense", "fp8_static", {"intermediate_size": 144}, "fp8 format=paddle` will refuse .*: 144 inputs do not"),
        ("moe", "w4a8", {"hidden_size": 160}, "w4a8 format=paddle` will refuse .* a multiple of 64 inputs"),
    ],
)
def test_sizes_that_train_and_are_not_exported_are_a_warning(kind: str, qat: str, sizes: dict, expected: str):
    [text] = warnings(kind, qat, **sizes)
    assert text.startswith(f"qat: {qat}: `erniekit export quantization=")
    assert re.search(expected, text), text


@pytest.mark.parametrize("qat", ["none", "wint4", "wint8", "wint4/8", "w8a8", "fp8", "fp8_static", "w4a8"])
def test_nothing_is_said_where_the_export_takes_the_model(qat: str):
    assert warnings("moe", qat) == []
    if qat.startswith("wint4"):
        assert warnings("moe", qat, group=32) == []


@pytest.mark.parametrize(
    ("given", "qat", "expected"),
    [
        (KINDS["dense"], "w4a8", "codes are those of experts, which this model does not have: .* w8a8"),
        (KINDS["dense"], "wint4/8", "codes are those of experts, which this model does not have: .* wint4"),
        (vision_config(), "w4a8", "FastDeploy has no names for quantised vision-language weights"),
    ],
)
def test_a_model_for_which_a_scheme_has_no_codes_is_not_trained(given: dict, qat: str, expected: str):
    with pytest.raises(ConfigError, match=rf"^qat: {qat}: `erniekit export .* will refuse .*{expected}"):
        check_export(qat, ModelConfig.from_dict(given), None)


def test_a_plan_refuses_it_too(tmp_path: Path):
    path = model_directory(tmp_path, weights=False)
    with pytest.raises(ConfigError, match=r"qat: w4a8: .* are those of experts"):
        plan.run([f"model_name_or_path={path}", "train_dataset_path=x", "output_dir=y", "qat=w4a8"])


def test_a_run_and_its_check_say_so_before_weights_are_read(tmp_path: Path):
    sizes = {"hidden_size": 160, "head_dim": 40}
    path = model_directory(tmp_path / "model", weights=False, **sizes)
    write_lines(tmp_path / "train.jsonl", [{"src": ["q"], "tgt": ["a"]}])
    keys = {
        "model_name_or_path": str(path),
        "continue_training": False,
        "train_dataset_path": str(tmp_path / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_seq_len": 64,
        "compute_type": "fp32",
        "qat": "fp8",
    }
    report = check.inspect([f"{name}={value}" for name, value in keys.items()])
    found = [finding.text for section in report.sections for finding in section.findings]
    with log.captured() as lines:
        build_run(config.load(None, keys, "train"), Mesh.single()).close()
    for said in (found, [text for _, text in lines]):
        assert any(text.startswith("qat: fp8: `erniekit export quantization=fp8 format=pt` will") for text in said)


def test_ranges_are_those_of_the_directory_as_it_is(tmp_path: Path):
    """A process that trains on and exports again writes the new ranges."""
    shape = ModelConfig.from_dict(KINDS["dense"] | SIZES)
    matrix = next(iter(scheme_for("fp8", "paddle", shape).every_matrix(shape)))
    name = f"{matrix.logical.param.removesuffix('.weight')}.product.range"
    for value in (1.0, 2.0):
        with Writer(tmp_path / "products", [(name, "F32", (1,))]) as writer:
            writer.write(name, np.array([value], np.float32))
        assert AsTrained(directory=tmp_path).input_range(matrix) == value
