"""Training as a user starts it: what it writes, and that stopping and going on changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import erniekit
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.utils import runtime

STEP_KEYS = {"step", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second"}


def steps_of(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def same(a, b, *names):
    return [[r[n] for n in names] for r in a] == [[r[n] for n in names] for r in b]


def weights(path):
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118 no mapping


def assert_same_weights(a, b):
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


def cli(workspace, *overrides, **popen):
    command = [sys.executable, "-m", "erniekit", "train", str(workspace / "run.yaml"), *overrides]
    # As many threads as here, where importing Paddle may have set OMP_NUM_THREADS: sums are divided over them.
    environment = os.environ | {"ERNIEKIT_NUM_THREADS": str(runtime.wanted_threads())}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **popen)


def test_a_run_writes_what_the_design_promises_and_its_loss_falls(workspace):
    result = erniekit.train(str(workspace / "run.yaml"), max_steps=30, save_steps=15, do_eval=True)
    out = workspace / "out"
    steps = steps_of(out)
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[0].keys() >= STEP_KEYS
    assert result.history == steps
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint-15", "checkpoint-30", "model.safetensors", "config.json", "config.yaml"} <= names
    assert {"loss.png", "summary.json", "tokenizer.json", "generation_config.json"} <= names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 30
    assert summary["eval_loss"] == pytest.approx(result.summary["eval_loss"])
    assert_same_weights(out, out / "checkpoint-30")


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(workspace, model):
    """Every kind of state at once: packing across epochs, accumulation, noise, MTP, router bias, optimizer state: of
    AdamW, and with moments in 16 bits of Muon.
    """
    keys = {
        "model_name_or_path": str(workspace / model),
        "gradient_accumulation_steps": 2,
        "batch_size": 1,
        "neftune": True,
        "num_nextn_predict_layers": 1,
        "max_steps": 9,
        "save_steps": 4,
        "num_train_epochs": 3,
        "ema_decay": 0.9,
        "batch_size_warmup_steps": 6,
        "z_loss_lambda": 1e-3,
    }
    if model == "dense":
        keys |= {"optim": "muon", "moment_dtype": "bf16"}
    else:
        keys |= {"moe_use_aux_free": True, "moe_aux_loss_lambda": 0.01, "moe_capacity_factor": 1.0}
    whole = erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "whole"), **keys)
    erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "parts"), **keys)
    for name in ("checkpoint-9", "checkpoint-8"):
        (workspace / "parts" / name).rename(workspace / f"{name}-aside")
    rest = erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "parts"), **keys)
    assert [record["step"] for record in rest.history] == [5, 6, 7, 8, 9]
    assert same(rest.history, whole.history[4:], "loss", "grad_norm", "learning_rate", "num_tokens")
    assert same(steps_of(workspace / "parts"), whole.history, "step", "loss")
    assert_same_weights(workspace / "parts", workspace / "whole")
    assert_same_weights(workspace / "parts" / "ema", workspace / "whole" / "ema")
    assert_same_weights(
        workspace / "parts" / "checkpoint-9" / "optimizer", workspace / "whole" / "checkpoint-9" / "optimizer"
    )


def test_kill_dash_nine_and_the_same_command_again(workspace):
    """Killed as soon as checkpoint-2 is there, so also in the middle of the steps and saves that follow it."""
    long = ("max_steps=12", f"output_dir={workspace / 'killed'}")
    process = cli(workspace, *long)
    deadline = time.monotonic() + 120
    while not (workspace / "killed" / "checkpoint-2").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = cli(workspace, *long)
    _, messages = again.communicate(timeout=120)
    assert again.returncode == 0, messages
    assert "resuming after step" in messages
    whole = erniekit.train(str(workspace / "run.yaml"), max_steps=12, output_dir=str(workspace / "whole"))
    assert same(steps_of(workspace / "killed"), whole.history, "step", "loss", "grad_norm")
    assert_same_weights(workspace / "killed", workspace / "whole")
    assert not [path.name for path in (workspace / "killed").iterdir() if path.name.endswith(".tmp")]


def test_a_complete_run_says_so_and_keeps_its_model(workspace):
    erniekit.train(str(workspace / "run.yaml"))
    before = weights(workspace / "out")
    again = erniekit.train(str(workspace / "run.yaml"))
    assert again.history == []
    assert all(before[name].tobytes() == array.tobytes() for name, array in weights(workspace / "out").items())


def test_recompute_changes_no_bit(workspace):
    keys = {"model_name_or_path": str(workspace / "moe"), "max_steps": 3, "moe_aux_loss_lambda": 0.01}
    plain = erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "a"), **keys)
    again = erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "b"), recompute=True, **keys)
    assert same(plain.history, again.history, "loss", "grad_norm")
    assert_same_weights(workspace / "a", workspace / "b")


def test_accumulation_and_batch_size_give_the_same_run(workspace):
    """4 x 1, 2 x 2 and 1 x 4 rows a step: the same rows, the same losses up to the order of fp32 sums."""
    runs = [
        erniekit.train(
            str(workspace / "run.yaml"),
            model_name_or_path=str(workspace / "moe"),
            output_dir=str(workspace / f"b{batch}"),
            batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_steps=4,
            moe_aux_loss_lambda=0.01,
        ).history
        for batch in (1, 2, 4)
    ]
    for other in runs[1:]:
        assert same(other, runs[0], "num_tokens", "num_supervised")
        np.testing.assert_allclose([r["loss"] for r in other], [r["loss"] for r in runs[0]], rtol=2e-5)


def test_early_stopping_keeps_the_best_model(workspace):
    """A learning rate that destroys the model: the first evaluation is the best, two worse ones end the run."""
    result = erniekit.train(
        str(workspace / "run.yaml"),
        max_steps=40,
        learning_rate=0.5,
        evaluation_strategy="steps",
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    assert result.summary["steps"] < 40
    best = result.summary["best_step"]
    assert_same_weights(workspace / "out", workspace / "out" / f"checkpoint-{best}")
    assert len([p for p in (workspace / "out").iterdir() if p.name.startswith("checkpoint-")]) == 2


def test_training_goes_on_from_a_models_weights(workspace):
    erniekit.train(str(workspace / "run.yaml"), max_steps=20)
    more = erniekit.train(
        str(workspace / "run.yaml"),
        model_name_or_path=str(workspace / "out"),
        continue_training=True,
        output_dir=str(workspace / "more"),
        max_steps=1,
    )
    last = steps_of(workspace / "out")[-1]["loss"]
    first = steps_of(workspace / "out")[0]["loss"]
    assert abs(more.history[0]["loss"] - last) < 0.5 * (first - last)
