"""When the trainer evaluates and saves, and what it does about it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support import equality

from erniekit import config
from erniekit.checkpoint.manager import list_checkpoints
from erniekit.parallel.mesh import Mesh
from erniekit.training.batch_warmup import microbatches_at
from erniekit.training.build import build_run
from erniekit.training.callbacks import Callback, build_callbacks
from erniekit.training.evaluators import Scores
from erniekit.training.trainer import Trainer, noise_seed
from erniekit.utils.errors import EvaluationError

SAMPLES = 12 * 9  # of equality.prepare


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer")
    equality.prepare(path)
    return path


class Events(Callback):
    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.steps: list[int] = []

    def on_step(self, metrics) -> None:
        self.steps.append(metrics.num_tokens)

    def on_evaluate(self, step, metrics) -> None:
        self.evaluated.append(step)


def keys_of(directory: Path, out: Path, **keys: object) -> dict[str, object]:
    evaluation = {"eval_dataset_path": f"{directory}/train.jsonl", "eval_dataset_type": "erniekit"}
    return equality.keys_for(str(directory), "dense", output_dir=str(out), **evaluation) | keys


@pytest.mark.parametrize("warmup", [0, 4, 40])
def test_epochs_end_where_their_rows_do_while_the_batch_grows(directory: Path, tmp_path: Path, warmup: int):
    """Evaluation and saving at the ends of epochs: after the steps that take the last rows of an epoch."""
    keys = keys_of(
        directory,
        tmp_path / "out",
        packing=False,
        batch_size=2,
        gradient_accumulation_steps=8,
        batch_size_warmup_steps=warmup,
        max_steps=-1,
        num_train_epochs=3,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        max_evaluate_steps=1,
        ignore_save_lr_and_optim=True,
    )
    rows, expected = 0, []
    for step in range(1000):
        before, rows = rows, min(rows + 2 * microbatches_at(step, 8, warmup), 3 * SAMPLES)
        if rows // SAMPLES > before // SAMPLES:
            expected.append(step + 1)
        if rows == 3 * SAMPLES:
            break
    cfg, events = config.load(None, keys, "train"), Events()
    run = build_run(cfg, Mesh.single())
    assert run.cfg is cfg, "what is logged is what runs"
    Trainer(run, [events]).fit()
    assert len(expected) == 3 and events.evaluated == expected and len(events.steps) == expected[-1]
    saved = [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(tmp_path / "out")]
    assert sorted(saved) == expected


def test_a_method_that_trains_nothing_ahead_leaves_the_configuration_as_it_was_given(directory: Path, tmp_path: Path):
    """num_nextn_predict_layers at stage DPO: config.yaml says what was asked, the model has no block for it, and the
    run is resumed with or without the key.
    """
    rows = [{"src": [f"{n}?"], "tgt": [], "response": [["one"], ["two"]], "sort": [1, 0]} for n in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = keys_of(directory, tmp_path / "out", stage="DPO", train_dataset_path=str(data))
    keys |= {"num_nextn_predict_layers": 1, "save_steps": 1, "gradient_accumulation_steps": 2}
    for steps in (1, 2):
        cfg = config.load(None, keys | {"max_steps": steps}, "train")
        run = build_run(cfg, Mesh.single())
        assert run.model.config.num_nextn_predict_layers == 0 and run.cfg.num_nextn_predict_layers == 1
        Trainer(run, build_callbacks(cfg)).fit()
        written = (tmp_path / "out" / "checkpoint-1" / "config.yaml").read_text(encoding="utf-8")
        assert "num_nextn_predict_layers: 1" in written
    keys["num_nextn_predict_layers"] = 0
    Trainer(build_run(config.load(None, keys | {"max_steps": 3}, "train"), Mesh.single()), []).fit()
    assert (tmp_path / "out" / "checkpoint-3").is_dir()


def test_the_last_checkpoint_is_saved_before_an_evaluation_can_fail(directory: Path, tmp_path: Path):
    cfg = config.load(None, keys_of(directory, tmp_path / "out", do_eval=True, max_steps=2, save_steps=100), "train")
    run = build_run(cfg, Mesh.single())

    def broken(evaluated, loader) -> Scores:
        list(loader.batches())
        return Scores({"loss": float("nan")}, {})

    run.method = dataclasses.replace(run.method, evaluator=broken)
    with pytest.raises(EvaluationError, match="after step 2: the loss on the evaluation data is nan"):
        Trainer(run, []).fit()
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and not (tmp_path / "out" / "model.safetensors").exists()


def test_noise_differs_between_steps_data_ranks_and_stages_but_not_between_tensor_ranks():
    def seed(step: int = 3, **place: int) -> int:
        return noise_seed(42, step, cast(Mesh, SimpleNamespace(**{"data": 0, "pipe": 0, "tensor": 0} | place)))

    seeds = [seed(data=data, pipe=pipe, step=step) for data in range(8) for pipe in range(8) for step in range(20)]
    assert len(set(seeds)) == len(seeds) and all(0 <= one < 2**32 for one in seeds)
    assert seed(tensor=1) == seed()
