"""What happens when a run continues and something is not as it was."""

import json
import pathlib
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from support import equality

from erniekit import config
from erniekit.checkpoint.manager import list_checkpoints
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.config.methods import METHODS
from erniekit.config.schema import fields
from erniekit.parallel.mesh import Mesh
from erniekit.training import resume_checks
from erniekit.training.build import build_run
from erniekit.training.callbacks import build_callbacks
from erniekit.training.resume_checks import DECISIONS, Decision
from erniekit.training.trainer import Trainer
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

ROWS = 10
PACKED = {"packing": True, "max_seq_len": 48}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    equality.prepare(path)
    lines = [{"src": [f"{n}加{n}等于几？"], "tgt": [str(n + n) * (1 + n % 4)]} for n in range(ROWS)]
    (path / "train.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "warning", lambda line: lines.append(f"warning: {line}"))
    return lines


@pytest.fixture
def fit(directory, tmp_path):
    """Runs the trainer in one output directory; the lines of the data file that it trained on, in order."""

    def run(**keys):
        keys = {"output_dir": str(tmp_path / "out"), "packing": False, "save_steps": 100, "max_steps": -1} | keys
        keys = {"batch_size": 4, "gradient_accumulation_steps": 1} | keys
        cfg = config.load(None, equality.keys_for(str(directory), "dense", **keys), "train")
        trainer = Trainer(build_run(cfg, Mesh.single()), build_callbacks(cfg))
        seen = []
        take = trainer.run.loader.next_step

        def note():
            batches = take()
            seen.extend(int(where.rpartition(":")[2]) for batch in batches for where in batch.sources)
            return batches

        trainer.run.loader.next_step = note
        trainer.fit()
        return seen

    run.out = tmp_path / "out"
    return run


def state_of(out, step):
    return json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())


def test_no_key_of_generation_that_a_method_trains_with_is_ignored():
    read = {key for facts in METHODS.values() for key in facts.also_reads}
    assert "max_new_tokens" in read
    assert not [key for key in read if DECISIONS[key] is Decision.IGNORE]


def test_every_key_has_a_decision():
    keys = [key for group in resume_checks._KEYS.values() for key in group.split()]
    assert sorted(keys) == sorted(fields()), "new key: decide in training/resume_checks.py what its change means"
    assert set(DECISIONS.values()) == set(Decision)


@pytest.mark.parametrize(
    ("first", "then", "epochs"),
    [
        ({}, {}, (1, 2)),
        ({}, {"batch_size": 3}, (1, 2)),
        ({}, {"gradient_accumulation_steps": 2}, (1, 3)),
        ({"batch_size": 1, "gradient_accumulation_steps": 3, "batch_size_warmup_steps": 4}, {}, (1, 2)),
        ({"batch_size": 1, "gradient_accumulation_steps": 3}, {"batch_size_warmup_steps": 20}, (1, 2)),
        (PACKED, {"batch_size": 1}, (1, 2)),
        (PACKED | {"batch_size": 2}, {}, (0.5, 2)),
        (PACKED | {"batch_size": 2}, {"batch_size": 3}, (1.5, 2)),
        (PACKED | {"greedy_intokens": False, "batch_size": 2}, {}, (1.5, 3)),
        ({"batch_size": 1, "max_steps": 7}, {"batch_size": 4, "max_steps": -1}, (1, 2)),
        ({"batch_size": 4, "max_estimate_samples": 5}, {}, (1, 2)),
    ],
    ids=str,
)
def test_every_row_is_seen_as_often_as_there_are_epochs(fit, first, then, epochs):
    seen = fit(num_train_epochs=epochs[0], **first)
    seen += fit(num_train_epochs=epochs[1], **(first | then))
    assert Counter(seen) == dict.fromkeys(range(1, ROWS + 1), epochs[1])


def test_fewer_epochs_than_were_trained_is_a_complete_run(fit, said):
    fit(num_train_epochs=2)
    assert fit(num_train_epochs=1) == []
    assert any("the run is complete: num_train_epochs is 1, and 5 steps are done" in line for line in said)


def test_epochs_end_where_their_rows_do(fit):
    fit(num_train_epochs=3, save_strategy="epoch")
    assert [path.name for path in list_checkpoints(fit.out)] == ["checkpoint-3", "checkpoint-5", "checkpoint-8"]


def test_with_a_growing_batch_epochs_end_there_too(fit):
    fit(num_train_epochs=2, save_strategy="epoch", batch_size=2, gradient_accumulation_steps=2)
    whole = [path.name for path in list_checkpoints(fit.out)]
    assert whole == ["checkpoint-3", "checkpoint-5"]
    shutil.rmtree(fit.out)
    keys = {"batch_size": 1, "gradient_accumulation_steps": 4, "batch_size_warmup_steps": 2}  # 2, 3, 4, 4, ... rows
    fit(num_train_epochs=2, save_strategy="epoch", **keys)
    assert [path.name for path in list_checkpoints(fit.out)] == ["checkpoint-4", "checkpoint-6"]


def test_ignore_data_skip_begins_the_data_anew_and_ends_once(fit, said):
    assert len(fit(num_train_epochs=2, max_steps=3)) == 12
    assert Counter(fit(num_train_epochs=2, ignore_data_skip=True)) == dict.fromkeys(range(1, ROWS + 1), 2)
    assert any("the data start again after step 3" in line for line in said)
    assert fit(num_train_epochs=2, ignore_data_skip=True) == []


def test_what_the_schedule_does_is_said(fit, said):
    fit(num_train_epochs=1, learning_rate=0.01)
    fit(num_train_epochs=2, learning_rate=0.02)
    changed = next(line for line in said if line.startswith("changed since checkpoint-3: "))
    assert "num_train_epochs: 1.0 -> 2.0" in changed and "learning_rate: 0.01 -> 0.02" in changed
    rate = next(line for line in said if line.startswith("learning rate of step 4: "))
    assert "0 -> 0.01, when the schedule had ended (the last step is 6, before 3;" in rate


def test_nothing_is_said_where_nothing_changed(fit, said):
    fit(num_train_epochs=1, max_steps=2)
    said.clear()
    fit(num_train_epochs=1, max_steps=2, logging_steps=7, recompute=True, dataloader_num_workers=1)
    assert not [line for line in said if "->" in line or "warning" in line]


def test_a_legitimate_change_is_said_by_key(fit, said):
    keys = {
        "learning_rate": 0.5,
        "weight_decay": 0.1,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "max_grad_norm": 2.0,
        "z_loss_lambda": 0.1,
        "neftune": True,
        "ema_decay": 0.5,
        "token_balance_loss": "sample",
        "compute_type": "bf16",
    }
    fit(max_steps=1)
    fit(max_steps=2, **keys)
    line = next(line for line in said if line.startswith("changed since checkpoint-1: "))
    assert [key for key in keys if f"{key}: " not in line] == []


def test_what_makes_the_checkpoint_anothers_is_refused_by_key(fit):
    keys = {
        "seed": 7,
        "max_seq_len": 32,
        "truncation": "cut",
        "packing": True,
        "random_shuffle": False,
        "num_nextn_predict_layers": 1,
        "rope_theta": 100.0,
        "continue_training": True,
        "fine_tuning": "Full",
    }
    fit(max_steps=1)
    before = {path: path.read_bytes() for path in fit.out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"holds another run \(run.json\):\n") as refusal:
        fit(max_steps=2, **keys)
    assert [key for key in keys if f"  {key}: " not in str(refusal.value)] == ["fine_tuning"]
    with pytest.raises(CheckpointError, match="fine_tuning: 'Full' there, 'LoRA' here"):
        fit(max_steps=2, fine_tuning="LoRA", continue_training=True)
    assert before == {path: path.read_bytes() for path in fit.out.rglob("*") if path.is_file()}


def test_keys_that_this_method_does_not_read_do_not_matter(fit, said):
    fit(max_steps=1)
    fit(max_steps=2, lora_rank=4, beta=0.3, buffer_size=7)
    assert not any("lora_rank" in line or "beta" in line or "buffer_size" in line for line in said)


@pytest.mark.parametrize(("key", "value", "there"), [("lora_rank", 4, True), ("lora_dropout", 0.1, False)])
def test_the_keys_of_an_adapter(fit, said, key, value, there):
    lora = {"fine_tuning": "LoRA", "continue_training": True}
    fit(max_steps=1, **lora)
    if there:
        with pytest.raises(CheckpointError, match=f"{key}: 8 there, {value} here"):
            fit(max_steps=2, **lora, **{key: value})
    else:
        fit(max_steps=2, **lora, **{key: value})
        assert any(f"{key}: 0.0 -> {value}" in line for line in said)


@pytest.mark.parametrize("change", ["edited", "appended", "shortened"])
def test_data_that_changed_is_noticed(fit, directory, tmp_path, said, change):
    path, text = tmp_path / "own.jsonl", (directory / "train.jsonl").read_text()
    path.write_text(text)
    fit(max_steps=2, train_dataset_path=str(path))
    lines = text.splitlines(keepends=True)
    edited = [*lines[:-1], lines[-1].replace("18", "19")]
    path.write_text("".join({"edited": edited, "appended": lines + lines[:2], "shortened": lines[:-1]}[change]))
    with pytest.raises(CheckpointError, match=r"content of train_dataset_path: (?s:.)*ignore_data_skip: true"):
        fit(max_steps=4, train_dataset_path=str(path))
    assert len(fit(max_steps=4, train_dataset_path=str(path), ignore_data_skip=True)) == 8
    assert any("content of train_dataset_path: " in line for line in said)


def test_data_and_model_may_be_called_otherwise(fit, directory, tmp_path, said):
    fit(max_steps=1)
    shutil.copytree(directory / "dense", tmp_path / "moved")
    shutil.copy(directory / "train.jsonl", tmp_path / "moved.jsonl")
    keys = {"model_name_or_path": str(tmp_path / "moved"), "train_dataset_path": str(tmp_path / "moved.jsonl")}
    fit(max_steps=2, **keys)
    assert any("model_name_or_path: " in line and "train_dataset_path: " in line for line in said)
    file = tmp_path / "moved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match=r"config.json: rms_norm_eps: 1e-0[56] there, 0.1 here"):
        fit(max_steps=3, **keys)


def test_another_chat_template_moves_the_position(fit, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    fit(max_steps=1, chat_template=str(template))
    fit(max_steps=2, chat_template=str(template))
    template.write_text(template.read_text().replace(": ", " says "))
    with pytest.raises(CheckpointError, match="chat template: "):
        fit(max_steps=3, chat_template=str(template))


EVALUATED = {"evaluation_strategy": "steps", "eval_steps": 1, "eval_dataset_type": "erniekit"}


def test_a_best_value_of_another_metric_is_forgotten(fit, directory, said):
    keys = EVALUATED | {"eval_dataset_path": f"{directory}/train.jsonl", "early_stopping_patience": 3}
    fit(max_steps=2, **keys, greater_is_better=True)
    first = state_of(fit.out, 2)
    assert first["best_of"]["metric_for_best_model"] == "eval_loss" and first["best_metric"] > 1
    fit(max_steps=3, **keys, metric_for_best_model="token_accuracy")
    now = state_of(fit.out, 3)
    assert now["best_step"] == 3 and now["best_metric"] <= 1 and now["evaluations_since_best"] == 0
    line = next(line for line in said if "is forgotten" in line)
    assert "metric_for_best_model: eval_loss -> eval_token_accuracy" in line and line.startswith("warning")


def test_a_best_value_on_other_data_or_in_the_other_direction_is_forgotten(fit, directory, tmp_path, said):
    (tmp_path / "eval.jsonl").write_text((directory / "train.jsonl").read_text().splitlines()[0] + "\n")
    keys = EVALUATED | {"eval_dataset_path": f"{directory}/train.jsonl"}
    fit(max_steps=1, **keys)
    fit(max_steps=2, **keys)
    assert not any("is forgotten" in line for line in said)
    fit(max_steps=3, **(keys | {"eval_dataset_path": str(tmp_path / "eval.jsonl")}))
    assert any("content of eval_dataset_path: " in line for line in said if "is forgotten" in line)
    said.clear()
    fit(max_steps=4, **(keys | {"eval_dataset_path": str(tmp_path / "eval.jsonl")}), greater_is_better=True)
    assert any("greater_is_better: False -> True" in line for line in said if "is forgotten" in line)


def test_without_the_optimizers_state_a_run_continues_and_warns(fit, said):
    fit(max_steps=2, ignore_save_lr_and_optim=True)
    assert len(fit(max_steps=4, ignore_save_lr_and_optim=True)) == 8
    assert any(line.startswith("warning: checkpoint-2 was saved without the optimizer's state") for line in said)


def test_state_that_was_saved_and_is_gone_is_an_error_with_the_cure(fit):
    fit(max_steps=2, ema_decay=0.9)
    shutil.rmtree(fit.out / "checkpoint-2" / "optimizer")
    with pytest.raises(CheckpointError, match=r"optimizer/ was saved .* gone.* ignore_load_lr_and_optim: true"):
        fit(max_steps=3, ema_decay=0.9)
    shutil.rmtree(fit.out / "checkpoint-2" / "ema")
    with pytest.raises(CheckpointError, match="ema/ was saved with it and is gone"):
        fit(max_steps=3, ema_decay=0.9)


@pytest.mark.parametrize(
    ("file", "content", "words", "cure"),
    [
        ("trainer_state.json", b'{"step": 2', "trainer_state.json.*not JSON", "Resume from an older checkpoint"),
        ("model.safetensors", b"half", "too short for the header", r"resume_from_checkpoint=.*checkpoint-1\.$"),
        (
            "optimizer/model.safetensors",
            b"half",
            "optimizer/model.safetensors: 4 bytes, too short",
            "ignore_load_lr_and_optim: true .*resume_from_checkpoint=.*-1",
        ),
    ],
)
def test_a_run_goes_back_from_a_damaged_checkpoint_and_keeps_it(fit, said, file, content, words, cure):
    whole = [fit(max_steps=step) for step in (1, 2)][-1]
    (fit.out / "checkpoint-2" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=cure):
        fit(max_steps=3, resume_from_checkpoint=str(fit.out / "checkpoint-2"))  # the user's choice is not replaced
    if file.startswith("optimizer"):
        assert fit(max_steps=2) == []  # the run has ended
        (fit.out / "model.safetensors").unlink()
    said.clear()
    assert fit(max_steps=2) == whole
    (line,) = (line for line in said if "is not whole" in line)
    assert re.search(words, line) and line.endswith("The run goes back to checkpoint-1")
    assert (fit.out / "abandoned-1" / "checkpoint-2" / file).read_bytes() == content
    for step in (1, 2):
        (fit.out / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .*checkpoint-2: .*; nor are checkpoint-1\. Set"
    ):
        fit(max_steps=3)


def test_an_optimizer_state_that_is_gone_is_an_error_with_the_cure(fit):
    """No damage of a disk: users delete it from runs that have ended."""
    for step in (1, 2):
        fit(max_steps=step)
    (fit.out / "checkpoint-2" / "optimizer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ignore_load_lr_and_optim: true .*resume_from_checkpoint=.*-1"):
        fit(max_steps=3)


def test_an_average_that_begins_later_begins_with_the_weights_of_its_first_step(fit, said):
    fit(max_steps=1)
    fit(max_steps=2, ema_decay=0.5)
    assert any(line.startswith("warning: ema_decay: checkpoint-1 holds no average") for line in said)
    read = [Reader(fit.out / place) for place in ("checkpoint-1", "checkpoint-2", "checkpoint-2/ema")]
    name = "model.norm.weight"
    before, after, average = (reader.read(name) for reader in read)
    np.testing.assert_allclose(average, (before + after) / 2, rtol=1e-6)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_a_finished_run_stays_as_it_is(fit, directory, said):
    keys = {"do_eval": True, "eval_dataset_path": f"{directory}/train.jsonl", "eval_dataset_type": "erniekit"}
    fit(max_steps=2, **keys)
    before = contents(fit.out)
    assert {"config.yaml", "summary.json", "metrics.jsonl", "model.safetensors"} <= before.keys()
    said.clear()
    assert fit(max_steps=2, learning_rate=0.5, weight_decay=0.1, **keys) == []
    assert contents(fit.out) == before
    line = next(line for line in said if line.startswith("without effect, since no step is left to train: "))
    assert "learning_rate: 0.001 -> 0.5; weight_decay: 0.0 -> 0.1" in line
    assert not any("training continues" in line or "training begins" in line for line in said)


def test_what_has_no_effect_is_said_of_a_run_that_saved_only_its_final_model(fit, said):
    fit(max_steps=2, save_strategy="no")
    before = contents(fit.out)
    assert fit(max_steps=2, save_strategy="no", learning_rate=0.5) == [] and contents(fit.out) == before
    assert any("without effect, since no step is left to train: learning_rate: 0.001 -> 0.5" in line for line in said)


def test_what_a_killed_process_did_not_finish_is_finished_once(fit, directory):
    """Killed after the last checkpoint and the last evaluation, before the final model."""
    keys = {"do_eval": True, "eval_dataset_path": f"{directory}/train.jsonl", "eval_dataset_type": "erniekit"}
    fit(max_steps=2, **keys)
    whole = contents(fit.out)
    for name in ("model.safetensors", "summary.json"):
        (fit.out / name).unlink()
    assert fit(max_steps=2, **keys) == []
    again = contents(fit.out)
    assert again["model.safetensors"] == whole["model.safetensors"]
    assert again["metrics.jsonl"] == whole["metrics.jsonl"]
    assert json.loads(again["summary.json"])["steps"] == 2


def test_a_run_stopped_early_stays_stopped(fit, directory):
    keys = EVALUATED | {"eval_dataset_path": f"{directory}/train.jsonl", "early_stopping_patience": 1}
    keys |= {"greater_is_better": True, "max_steps": 9}  # of a loss that falls
    fit(**keys)
    before = contents(fit.out)
    assert fit(**keys) == [] and contents(fit.out) == before


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_line(fit, said):
    fit(max_steps=2)
    file = fit.out / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    for name in ("best_of", "base", "max_steps", "has_optimizer"):
        del state[name]
    old = ("model_name_or_path", "stage", "train_dataset_path", "seed", "max_seq_len", "packing")
    state["identity"] = {key: state["identity"][key] for key in old}
    for name in ("content of train_dataset_path", "tokenizer", "chat template"):
        del state["data"]["data"][name]
    for name in ("stop", "last", "closed"):
        del state["data"]["position"][name]
    file.write_text(json.dumps(state))
    assert len(fit(max_steps=3)) == 4
    assert any("saved by an earlier version" in line for line in said)
    with pytest.raises(
        CheckpointError, match=r"resume_from_checkpoint: .* is of another run:\n  seed: 42 there, 7 here"
    ):
        fit(max_steps=3, seed=7, resume_from_checkpoint=str(fit.out / "checkpoint-2"))


def test_a_checkpoint_that_does_not_exist_is_named_with_its_key(fit, tmp_path):
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint: there is no directory .*nowhere"):
        fit(max_steps=1, resume_from_checkpoint=str(tmp_path / "nowhere"))


LISTS = ("train_dataset_path", "train_dataset_prob", "lora_target_modules")


@pytest.mark.parametrize("as_earlier", [False, True])
def test_a_list_that_a_checkpoint_noted_is_the_same_list(as_earlier):
    """In JSON a list is no tuple, and earlier versions noted comma-separated text."""
    keys = {"model_name_or_path": "m", "output_dir": "o", "fine_tuning": "LoRA", "mix_strategy": "interleave_over"}
    keys |= {"train_dataset_prob": "0.25,0.75", "train_dataset_path": "a,b", "lora_target_modules": "q_proj,v_proj"}
    cfg = config.load(None, keys, "train")
    saved = json.loads(json.dumps(resume_checks.noted(cfg)))
    saved |= {name: keys[name] for name in LISTS} if as_earlier else {}
    resume_checks.check_keys(saved, cfg, pathlib.Path("out/checkpoint-1"))
    with pytest.raises(CheckpointError, match=r"lora_target_modules: .*q_proj.* there, .*o_proj.* here"):
        changed = config.load(None, keys | {"lora_target_modules": "o_proj"}, "train")
        resume_checks.check_keys(saved, changed, pathlib.Path("out/checkpoint-1"))
