"""A run that will not fit is announced before its weights are read."""

from pathlib import Path

import pytest
from support.tiny_directories import model_directory

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.training import fit_check
from erniekit.utils import log


@pytest.mark.parametrize(("memory", "warns"), [(10**9, False), (20 * 10**6, True)])
def test_a_run_that_does_not_fit_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, warns: bool
):
    """With the cheapest change by which it would."""
    directory = model_directory(tmp_path / "model", weights=False)
    words = [f"model_name_or_path={directory}", f"output_dir={tmp_path}", "train_dataset_path=x.jsonl"]
    cfg = config.load(None, [*words, "max_seq_len=512", "batch_size=2", "compute_type=fp32"], "train")
    monkeypatch.setattr(fit_check, "host_memory", lambda: memory)
    with log.captured() as lines:
        fit_check.warn_if_too_large(cfg, ModelConfig.from_dir(directory), Mesh.single())
    found = [text for is_warning, text in lines if is_warning]
    assert bool(found) is warns
    if warns:
        assert "this run may not fit" in found[0] and "it would fit with " in found[0]


@pytest.mark.parametrize(("local", "warns"), [("2", False), ("4", True), ("", True)])
def test_a_host_s_memory_is_divided_by_its_own_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str, warns: bool
):
    directory = model_directory(tmp_path / "model", weights=False)
    words = [f"model_name_or_path={directory}", f"output_dir={tmp_path}", "train_dataset_path=x.jsonl"]
    cfg = config.load(None, [*words, "max_seq_len=512", "batch_size=2", "compute_type=fp32"], "train")
    monkeypatch.setattr(fit_check, "host_memory", lambda: 70 * 10**6)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", local)
    monkeypatch.setattr(fit_check.comm, "gather_objects", lambda value, group: [value] * group.size)
    with log.captured() as lines:
        fit_check.warn_if_too_large(cfg, ModelConfig.from_dir(directory), Mesh.outline(ParallelDims(data=4), 0))
    assert any(is_warning for is_warning, _ in lines) is warns


def test_the_smallest_host_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first rank's host has enough memory, and that of the third rank has not."""
    directory = model_directory(tmp_path / "model", weights=False)
    words = [f"model_name_or_path={directory}", f"output_dir={tmp_path}", "train_dataset_path=x.jsonl"]
    cfg = config.load(None, [*words, "max_seq_len=512", "batch_size=2", "compute_type=fp32"], "train")
    monkeypatch.setattr(fit_check, "host_memory", lambda: 10**9)
    monkeypatch.setattr(fit_check.comm, "gather_objects", lambda value, group: [value, value, 2e7, value])
    with log.captured() as lines:
        fit_check.warn_if_too_large(cfg, ModelConfig.from_dir(directory), Mesh.outline(ParallelDims(data=4), 0))
    [found] = [text for is_warning, text in lines if is_warning]
    assert "this run may not fit" in found and "cpu of rank 2 has" in found


def test_keys_without_effect_may_be_lists_and_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ERNIEKit's files list operations for mixed precision, and its pretraining files have a block `env`."""
    directory = model_directory(tmp_path / "model", weights=False)
    words = [f"model_name_or_path={directory}", f"output_dir={tmp_path}", "train_dataset_path=x.jsonl"]
    words += ["amp_custom_white_list=[matmul, flash_attn]", "env={HOME: null}", "compute_type=fp32"]
    cfg = config.load(None, words, "train")
    monkeypatch.setattr(fit_check, "host_memory", lambda: 10**9)
    with log.captured() as lines:
        fit_check.warn_if_too_large(cfg, ModelConfig.from_dir(directory), Mesh.single())
    assert not any(is_warning for is_warning, _ in lines)
