"""What a run says and keeps when it saves and goes on."""

import errno

import equality
import numpy as np
import pytest

from erniekit import config
from erniekit.checkpoint.folder import copy_companions
from erniekit.checkpoint.manager import list_checkpoints
from erniekit.checkpoint.model_io import load_model, save_model
from erniekit.checkpoint.portion import Portion
from erniekit.checkpoint.safetensors import Reader
from erniekit.parallel.mesh import Mesh
from erniekit.train import build, saving
from erniekit.train.build import build_run
from erniekit.train.trainer import Trainer
from erniekit.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    equality.prepare(path)
    return path


def fit(directory, out, **keys):
    keys = {"output_dir": str(directory / out), "max_steps": 3, "save_steps": 1} | keys
    cfg = config.load(None, equality.keys_for(str(directory), "dense", **keys), "train")
    Trainer(build_run(cfg, Mesh.single()), []).fit()
    return directory / out


def weights(path):
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_another_number_of_rows_a_step_is_said(directory, monkeypatch):
    lines = []
    monkeypatch.setattr(saving.log, "warning", lines.append)
    fit(directory, "rows", max_steps=1)
    fit(directory, "rows", max_steps=2)
    assert lines == []
    fit(directory, "rows", gradient_accumulation_steps=3)
    assert len(lines) == 1 and "a step now takes 3 rows" in lines[0] and "before 8" in lines[0]


def test_a_16_bit_base_that_is_saved_as_float32_is_said(directory, tmp_path, monkeypatch):
    save_model(load_model(directory / "dense"), tmp_path / "half", dtype="float16")
    copy_companions(directory / "dense", tmp_path / "half")
    lines = []
    monkeypatch.setattr(build.log, "info", lines.append)
    out = fit(directory, "half", max_steps=1, model_name_or_path=str(tmp_path / "half"), continue_training=True)
    assert f"{tmp_path / 'half'} holds float16; what this run saves is float32" in lines
    assert Reader(out).info("model.norm.weight").dtype == "F32"


def test_saving_beside_the_training_changes_no_bit(directory):
    at_once, beside = (
        fit(directory, "once", ema_decay=0.9),
        fit(directory, "beside", ema_decay=0.9, use_async_save=True),
    )
    for place in ("checkpoint-1", "checkpoint-2/optimizer", "checkpoint-3/ema", "", "ema"):
        assert same(weights(at_once / place), weights(beside / place)), place
        assert {p.name for p in (at_once / place).iterdir()} == {p.name for p in (beside / place).iterdir()}


def test_the_best_model_is_kept_although_saves_end_late(directory):
    keys = {
        "eval_dataset_path": f"{directory}/train.jsonl",
        "eval_dataset_type": "erniekit",
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "max_evaluate_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "use_async_save": True,
        "greater_is_better": True,  # of a loss that falls: the first evaluation is the best
        "metric_for_best_model": "loss",
    }
    out = fit(directory, "best", **keys)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-3"]
    assert same(weights(out), weights(out / "checkpoint-1"))


def test_a_failure_beside_the_training_ends_the_run(directory, monkeypatch):
    def write(self, root):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Portion, "write", write)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written.*disk is full"):
        fit(directory, "full", use_async_save=True)
    assert list_checkpoints(directory / "full") == []
