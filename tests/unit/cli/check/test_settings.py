"""What `erniekit check` says of the keys."""

import pytest

from erniekit import config
from erniekit.cli.check import settings
from erniekit.cli.check.report import Section


@pytest.mark.parametrize(("command", "boards"), [("train", ["tensorboard"]), ("eval", [])])
def test_a_board_whose_package_is_missing_is_a_warning(tmp_path, monkeypatch, command, boards):
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "tensorboardX" else name)
    words = [
        "model_name_or_path=examples/models/tiny-dense",
        f"output_dir={tmp_path}",
        "report_to=[tensorboard, wandb]",
    ]
    words += [f"{split}_dataset_path=data/demo/test.jsonl" for split in ("train", "eval")]
    section = Section("keys")
    settings.inspect(section, config.load(None, words, command), command)
    warnings = [finding.text for finding in section.findings if finding.level == "warning"]
    assert len(warnings) == len(boards)
    for name, warning in zip(boards, warnings, strict=True):
        assert f"the package of {name} is not installed here" in warning
