"""The section `exported model` of `erniekit check`: what stops an export before it reads a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.quantised import saved_model

from erniekit.cli import check

# Heads whose outputs do not divide into groups of 32.
ODD = {"hidden_size": 160, "head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 2}


def findings(path: Path, level: str, **keys: Any) -> list[str]:
    given = {"output_dir": path, "quantization": "wint8"} | keys
    report = check.inspect([f"{name}={value}" for name, value in given.items()], "export")
    return [finding.text for section in report.sections for finding in section.findings if finding.level == level]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    saved_model(path / "odd", "dense", **ODD)
    saved_model(path / "moe", "moe")
    return path


@pytest.mark.parametrize(
    ("model", "keys", "expected"),
    [
        ("odd", {"quantization": "fp8"}, "160 is not a multiple of 128"),
        ("odd", {"quantization": "wint4"}, "has 120 inputs, which do not divide into groups"),
        ("odd", {"quantization": "wint4/8"}, "codes are those of experts, which this model does not have"),
        ("moe", {"quantization": "w4a8", "format": "paddle"}, "the file keeps the largest magnitude of the inputs"),
        ("moe", {"quantization": "w4a8"}, "no engine reads such a file in the layout format: pt"),
        ("moe", {"quantization": "wint2", "format": "paddle", "quantization_first_layers": 2}, "nothing would have 2"),
        ("moe", {"quantization_calibration_path": "none.jsonl"}, "there is no file or directory 'none.jsonl'"),
    ],
)
def test_a_scheme_that_does_not_fit_would_stop_the_export(models: Path, model: str, keys: dict[str, Any], expected):
    [error] = findings(models / model, "error", **keys)
    assert expected in error


def test_what_fits_is_said_and_nothing_is_written(models: Path):
    path = models / "moe"
    assert f"{path / 'export'}: layout pt, quantization: wint8" in findings(path, "ok")
    assert f"{path / 'export'}: layout pt, not quantised" in findings(path, "ok", quantization="none")
    assert findings(path, "error") == [] and not (path / "export").exists()


def test_texts_that_are_not_here_are_not_downloaded(models: Path):
    [note] = findings(models / "moe", "note", quantization_calibration_path="owner/texts")
    assert note == "owner/texts is not a local path: the scheme is checked once it is on this machine"


def test_another_model_in_the_target_would_stop_the_export(tmp_path: Path):
    path = saved_model(tmp_path / "model", "dense")
    saved_model(path / "export", "dense")
    for scheme in ("none", "wint8"):
        [error] = findings(path, "error", quantization=scheme)
        assert "holds another model than what was written from" in error
    assert json.loads((path / "export" / "config.json").read_text())["hidden_size"] == 128
