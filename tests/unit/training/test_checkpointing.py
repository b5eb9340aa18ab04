"""What a run says and keeps when it saves and goes on."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from support import equality

from erniekit import config
from erniekit.build import load_model
from erniekit.checkpoint.manager import list_checkpoints
from erniekit.checkpoint.model_dir import copy_companions, find_checkpoint
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.parallel.mesh import Mesh
from erniekit.training import build, checkpointing
from erniekit.training.build import build_run
from erniekit.training.callbacks import Callback, build_callbacks
from erniekit.training.trainer import Trainer
from erniekit.utils.directory_lock import DirectoryLock
from erniekit.utils.errors import CheckpointError, ConfigError, UserError

EVALUATED = {"eval_dataset_type": "erniekit", "max_evaluate_steps": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    equality.prepare(path)
    return path


def fit(directory, out, callbacks=False, more=(), **keys):
    keys = {"output_dir": str(directory / out), "max_steps": 3, "save_steps": 1} | keys
    cfg = config.load(None, equality.keys_for(str(directory), "dense", **keys), "train")
    Trainer(build_run(cfg, Mesh.single()), [*(build_callbacks(cfg) if callbacks else []), *more]).fit()
    return directory / out


def weights(path):
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_another_number_of_rows_a_step_is_said(directory, monkeypatch):
    lines = []
    monkeypatch.setattr(checkpointing.log, "warning", lines.append)
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


def test_a_run_that_cannot_be_resumed_leaves_no_workers(directory, monkeypatch):
    checkpoint = fit(directory, "damaged", max_steps=1) / "checkpoint-1"
    (checkpoint / "model.safetensors").write_bytes(b"half")
    closed = []
    monkeypatch.setattr(build.Run, "close", lambda run: closed.append(run))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fit(directory, "damaged", resume_from_checkpoint=str(checkpoint))
    assert len(closed) == 1


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
        "ema_decay": 0.5,
        "save_total_limit": 1,
        "use_async_save": True,
        "greater_is_better": True,  # of a loss that falls: the first evaluation is the best
        "metric_for_best_model": "loss",
    }
    out = fit(directory, "best", **keys)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-3"]
    for place in ("", "ema"):  # the average, too, is that of the best step
        assert same(weights(out / place), weights(out / "checkpoint-1" / place))


@pytest.mark.parametrize("data_ends", [False, True])
def test_the_last_step_is_compared_with_the_best_one(directory, monkeypatch, data_ends):
    """The loss falls, so that the last step is the best, which eval_steps does not reach."""
    steps = 3
    if data_ends:
        take = Trainer._next_batches
        monkeypatch.setattr(
            Trainer, "_next_batches", lambda run: take(run) if run.state.step < steps else next(iter(()))
        )
    keys = {
        "eval_dataset_path": f"{directory}/train.jsonl",
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 5 if data_ends else steps,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "report_to": "none",
    }
    out = fit(directory, f"last-{data_ends}", callbacks=True, **EVALUATED | keys)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 3]
    state = json.loads((out / "checkpoint-3/trainer_state.json").read_text())
    assert state["best_step"] == 3 and same(weights(out), weights(out / "checkpoint-3"))


@pytest.mark.parametrize(("stage", "distance"), [("O1", 1e-4), ("O2", 0.005)])
def test_a_run_resumed_from_coded_moments_stays_near_the_uninterrupted_one(directory, monkeypatch, stage, distance):
    """`distance`: of the losses, which are about 4; some four times what was measured (1.5e-5 and 1.2e-3). Where
    moments are lost (ignore_load_lr_and_optim) it is 0.03.
    """
    lines, losses = [], []
    monkeypatch.setattr(checkpointing.log, "info", lines.append)

    class Losses(Callback):
        def on_step(self, metrics):
            losses.append(metrics.loss)

    keys = {"max_steps": 8, "save_steps": 5, "learning_rate": 5e-3, "ckpt_quant_stage": stage, "use_async_save": True}
    out = fit(directory, f"coded-{stage}", more=[Losses()], **keys)
    whole, losses[:] = np.array(losses[5:]), []
    back = keys | {"resume_from_checkpoint": f"{out}/checkpoint-5"}
    fit(directory, f"coded-{stage}", more=[Losses()], **back)
    resumed, losses[:] = np.array(losses), []
    fit(directory, f"coded-{stage}", more=[Losses()], **back, ignore_load_lr_and_optim=True)
    assert 0 < np.abs(resumed - whole)[1:].max() < distance < np.abs(losses - whole)[1:].max()
    said = [line for line in lines if line.startswith("ckpt_quant_stage")]
    assert f"{stage}: the moments of" in said[0] and "MiB instead of" in said[0] and "(relative RMS)" in said[0]
    assert f"checkpoint-5 holds AdamW's moments in {8 if stage == 'O1' else 4} bits ({stage})" in said[2]


def test_coded_moments_beside_the_momentum_of_muon(directory, monkeypatch):
    """AdamW's moments of embedding and head are coded, Muon's momentum is as it was."""
    lines, losses = [], []
    monkeypatch.setattr(checkpointing.log, "info", lines.append)

    class Losses(Callback):
        def on_step(self, metrics):
            losses.append(metrics.loss)

    keys = {"max_steps": 3, "save_steps": 1, "learning_rate": 5e-3, "ckpt_quant_stage": "O1", "optim": "muon"}
    out = fit(directory, "muon-coded", more=[Losses()], **keys)
    whole, losses[:] = losses[1:], []
    fit(directory, "muon-coded", more=[Losses()], **keys, resume_from_checkpoint=f"{out}/checkpoint-1")
    np.testing.assert_allclose(losses, whole, atol=1e-3)
    assert losses[0] == whole[0] and losses != whole
    stored = Reader(out / "checkpoint-1" / "optimizer")
    types = {(name.rpartition("/")[2], stored.info(name).dtype) for name in stored.keys()}  # noqa: SIM118 no mapping
    assert [kind for field, kind in types if field == "momentum"] == ["F32"] and ("moment1", "I8") in types
    assert any(line.endswith("parameters stays in fp32 (optim: muon)") for line in lines)


def test_a_failure_beside_the_training_ends_the_run(directory, monkeypatch):
    def write(self, root):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RankFiles, "write", write)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written.*disk is full"):
        fit(directory, "full", use_async_save=True)
    assert list_checkpoints(directory / "full") == []


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "keys",
    [
        {"do_eval": True},
        {"save_strategy": "no"},
        {
            "evaluation_strategy": "steps",
            "eval_steps": 1,
            "early_stopping_patience": 1,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        },
    ],
    ids=["evaluated", "final model alone", "stopped early"],
)
def test_a_finished_run_started_again_changes_no_byte(directory, keys, request):
    """Also with other values, of which config.yaml would then tell falsely."""
    name = f"again-{request.node.callspec.id}".replace(" ", "-")
    keys = keys | EVALUATED | {"eval_dataset_path": f"{directory}/train.jsonl", "report_to": "none"}
    out = fit(directory, name, callbacks=True, **keys)
    before = contents(out)
    assert {"config.yaml", "run.json", "metrics.jsonl", "summary.json", "model.safetensors"} <= before.keys()
    fit(directory, name, callbacks=True, **keys)
    fit(directory, name, callbacks=True, **keys | {"learning_rate": 0.5})
    assert contents(out) == before


def test_a_run_that_was_killed_before_its_final_model_ends_without_repeating_its_evaluation(directory, monkeypatch):
    keys = EVALUATED | {"do_eval": True, "eval_dataset_path": f"{directory}/train.jsonl"}
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Saver, "save_final", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(directory, "no-final", callbacks=True, **keys)
    out = fit(directory, "no-final", callbacks=True, **keys)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "eval_loss" in record) for record in records] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    assert same(weights(out), weights(out / "checkpoint-3"))


def test_a_run_without_checkpoints_cannot_be_made_longer(directory):
    fit(directory, "short", save_strategy="no", max_steps=1)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from to step 2"):
        fit(directory, "short", save_strategy="no", max_steps=2)


def test_going_back_keeps_the_new_branch_under_the_limit(directory):
    out = fit(directory, "back", callbacks=True, max_steps=6, save_steps=2)
    back = {"resume_from_checkpoint": f"{out}/checkpoint-2", "save_steps": 3, "save_total_limit": 1}
    fit(directory, "back", callbacks=True, max_steps=5, **back)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-5"]
    assert [path.name for path in list_checkpoints(out / "abandoned-1")] == ["checkpoint-4", "checkpoint-6"]
    assert same(weights(out), weights(out / "checkpoint-5"))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_an_old_final_model_does_not_stand_for_the_run_under_way(directory, monkeypatch):
    out = fit(directory, "under-way", max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Saver, "save_final", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(directory, "under-way", max_steps=4)
        assert find_checkpoint(out) == out / "checkpoint-4", "newer than the final model of step 2"
        with pytest.raises(ZeroDivisionError):
            fit(directory, "under-way", max_steps=2, seed=7, overwrite_output_dir=True)
        assert not (out / "model.safetensors").exists() and find_checkpoint(out) == out / "checkpoint-2"
    fit(directory, "under-way", max_steps=2, seed=7)
    assert find_checkpoint(out) == out


def test_a_second_run_in_the_directory_is_refused_before_anything_changes(directory):
    first = DirectoryLock(directory / "two")
    first.acquire()
    try:
        with pytest.raises(ConfigError, match=r"output_dir: .* is in use by process"):
            fit(directory, "two")
        assert [path.name for path in (directory / "two").iterdir()] == ["run.lock"]
    finally:
        first.release()
    fit(directory, "two", max_steps=1)
    assert not (directory / "two" / "run.lock").exists()


@pytest.mark.parametrize("beside", [False, True])
def test_an_output_directory_that_is_removed_ends_the_run(directory, beside):
    class Remove(Callback):
        def on_step(self, metrics):
            if metrics.step == 2:
                # Renamed first: to remove it takes a moment, in which a save beside the training finds half of it.
                (directory / "gone").rename(directory / f"gone-{beside}")
                shutil.rmtree(directory / f"gone-{beside}", ignore_errors=True)

    with pytest.raises(UserError, match="was removed or renamed during the run"):
        fit(directory, "gone", callbacks=True, more=[Remove()], use_async_save=beside)
    assert not (directory / "gone").exists()


def test_no_directory_that_cannot_be_made_is_passed_over(directory, monkeypatch):
    """A disk that is full at any one mkdir: an error, never a run that ends well without what it lacks."""
    real, number, failed = os.mkdir, 0, True
    while failed:
        made = 0

        def full(path, *args, number=number, **more):
            nonlocal made
            made += not os.path.lexists(path)
            if made == number + 1 and not os.path.lexists(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path, *args, **more)

        shutil.rmtree(directory / "full-once", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", full)
            try:
                fit(directory, "full-once", max_steps=1, ema_decay=0.5)
                failed = False
            except UserError as error:
                assert "full" in str(error) or "space" in str(error).lower()
        number += failed
    assert made == number > 4
