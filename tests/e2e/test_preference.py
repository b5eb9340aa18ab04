"""Preference optimisation as a user starts it: what it reports, that it learns, and that stopping changes nothing."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

import erniekit
from erniekit import lora
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.config import load
from erniekit.evaluate.run import evaluate
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.utils.errors import CheckpointError, ConfigError

METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "kl")


@pytest.fixture
def pairs(workspace):
    """Pairs whose chosen answer is a whole sentence; as the workspace's training and evaluation data."""
    lines = [
        {"src": [f"{a}加{b}等于几？"], "tgt": [], "response": [[f"{a + b}"], [f"答案是{a + b}。"]], "sort": [0, 2]}
        for a in range(8)
        for b in range(8)
    ]
    for name, part in (("train", lines), ("eval", lines[:8])):
        (workspace / f"{name}.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in part))
    return workspace


def train(workspace, **keys):
    defaults = {"stage": "DPO", "max_seq_len": 128, "learning_rate": 3e-3, "save_strategy": "no"}
    return erniekit.train(str(workspace / "run.yaml"), **(defaults | keys))


def test_a_run_begins_at_ln_2_and_learns_what_is_preferred(pairs):
    result = train(pairs, max_steps=20, do_eval=True, evaluation_strategy="steps", eval_steps=10)
    history = result.history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["reward_margin"] == 0.0 and history[0]["kl"] == 0.0
    assert history[-1]["loss"] < 0.3 and history[-1]["reward_accuracy"] == 1.0
    assert history[-1].keys() >= set(METRICS)
    assert history[-1]["reward_margin"] == pytest.approx(history[-1]["reward_chosen"] - history[-1]["reward_rejected"])
    records = [json.loads(line) for line in (pairs / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval_loss" in record]
    assert evaluated[-1]["eval_reward_accuracy"] == 1.0
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] < math.log(2)


def test_from_the_command_line(pairs):
    def erniekit(command, *overrides):
        line = [sys.executable, "-m", "erniekit", command, str(pairs / "run.yaml"), "stage=DPO", "max_seq_len=128"]
        done = subprocess.run([*line, *overrides], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    said = erniekit("train", "max_steps=4", "normalize_logps=true", "num_nextn_predict_layers=1").stderr
    assert "not sigmoid as published" in said and "num_nextn_predict_layers: no effect: stage DPO" in said
    assert "reference: a second copy of the model" in said
    erniekit("eval", "predict_with_generate=true", "max_new_tokens=4")
    results = json.loads((pairs / "out" / "eval_results.json").read_text())
    assert results["num_samples"] == results["num_answers"] == 8 and results["reward_accuracy"] >= 0
    answers = [json.loads(line) for line in (pairs / "out" / "eval_predictions.jsonl").read_text().splitlines()]
    assert answers[0]["reference"] == "答案是0。"


@pytest.mark.parametrize(("model", "dropout"), [("dense", 0.0), ("moe", 0.0), ("dense", 0.3)])
def test_accumulated_and_packed_rows_give_one_step(pairs, model, dropout):
    """The first steps of 8 rows as 8 x 1, 2 x 4 and 1 x 8: losses, rewards and norms to fp32 rounding."""
    keys = {
        "attention_probs_dropout_prob": dropout,
        "model_name_or_path": str(pairs / model),
        "max_steps": 3,
        "packing": True,
        "max_seq_len": 64,
    }
    if model == "moe":
        keys |= {"moe_aux_loss_lambda": 0.01, "moe_z_loss_lambda": 0.01}
    runs = [
        train(
            pairs, output_dir=str(pairs / f"{size}"), batch_size=size, gradient_accumulation_steps=8 // size, **keys
        ).history
        for size in (8, 2, 1)
    ]
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            for name in (
                "loss",
                "grad_norm",
                "reward_margin",
                "logp_chosen",
                "loss_pref" if model == "moe" else "loss",
            ):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-5), name


def teacher_in(directory):
    """A model with other random weights than those that training starts from."""
    shutil.copytree(directory / "dense", directory / "teacher")
    model = CausalLM(ModelConfig.from_dir(directory / "teacher"))
    init_weights(model, 7)
    erniekit.save_model(model, directory / "teacher")
    return directory / "teacher"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ref_model_update_steps": 3, "gradient_accumulation_steps": 2},
        pytest.param({"loss_type": "kto_pair", "sft_loss_ratio": 0.5, "neftune": True}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "orpo", "num_train_epochs": 3}, marks=pytest.mark.slow),
        {"attention_probs_dropout_prob": 0.3, "dropout_warmup_steps": 6, "recompute": True},
        {"stage": "KTO"},
        {"stage": "GKD", "lmbda": 0.5, "max_new_tokens": 6, "temperature": 1.0},
    ],
    ids=["plain", "moving reference", "kto pairs", "orpo", "attention dropout", "judged", "distilled"],
)
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(pairs, keys):
    if keys.get("stage") in ("KTO", "GKD"):
        lines = [{"src": [f"{a}加{a * a}？"], "tgt": [str(a + a * a)]} for a in range(60)]
        lines = [line | {"label": a % 3 > 0} for a, line in enumerate(lines)] if keys["stage"] == "KTO" else lines
        (pairs / "train.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    if keys.get("stage") == "GKD":
        keys = keys | {"teacher_model_name_or_path": str(teacher_in(pairs))}
    keys = {"save_strategy": "steps", "save_steps": 4, "batch_size": 1, **keys}
    whole = train(pairs, output_dir=str(pairs / "whole"), max_steps=8, **keys)
    train(pairs, output_dir=str(pairs / "parts"), max_steps=8, **keys)
    shutil.rmtree(pairs / "parts" / "checkpoint-8")  # as if the run had been killed after step 4
    rest = train(pairs, output_dir=str(pairs / "parts"), max_steps=8, **keys)
    assert len(rest.history) == 4
    for ours, theirs in zip(whole.history[4:], rest.history, strict=True):
        assert all(ours[name] == theirs[name] for name in ours.keys() & {"step", "loss", "grad_norm", "reward_margin"})
    one, other = Reader(pairs / "whole"), Reader(pairs / "parts")
    for name in one.keys():  # noqa: SIM118 no mapping
        assert one.read(name).tobytes() == other.read(name).tobytes(), name


def test_attention_dropout_is_for_the_policy_in_training_alone(pairs):
    """The reference and evaluations see no dropout, and with a warm-up the first step sees none either."""
    keys = {"max_steps": 2, "attention_probs_dropout_prob": 0.5, "learning_rate": 0.0, "do_eval": True}
    dropped = train(pairs, output_dir=str(pairs / "a"), **keys)
    assert all(abs(step["loss"] - math.log(2)) > 1e-4 for step in dropped.history)
    assert dropped.summary["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    warm = train(pairs, output_dir=str(pairs / "b"), dropout_warmup_steps=4, **keys).history
    assert warm[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(warm[1]["loss"] - math.log(2)) > 1e-5


def test_log_probabilities_computed_once_change_nothing(pairs):
    cache = pairs / "cache" / "ref.npz"
    plain = train(pairs, output_dir=str(pairs / "plain"), max_steps=5, do_eval=True)
    first = train(pairs, output_dir=str(pairs / "a"), max_steps=5, do_eval=True, ref_logps_cache=str(cache))
    with np.load(cache) as archive:
        assert archive["keys"].shape == (64, 16)  # the evaluation data is part of the training data
    written = cache.read_bytes()
    again = train(
        pairs, output_dir=str(pairs / "b"), max_steps=5, ref_logps_cache=str(cache), packing=False, do_eval=True
    )
    assert cache.read_bytes() == written
    for ours, theirs in zip(plain.history, first.history, strict=True):
        for name in ("loss", "reward_margin"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)
    assert first.summary["eval_loss"] == pytest.approx(plain.summary["eval_loss"], rel=1e-4)
    assert again.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(CheckpointError, match="another reference: weights was random start, seed 42"):
        train(pairs, output_dir=str(pairs / "c"), max_steps=1, seed=7, ref_logps_cache=str(cache))
    cache.write_bytes(written[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(pairs, output_dir=str(pairs / "d"), max_steps=1, ref_logps_cache=str(cache))


@pytest.fixture
def base(pairs):
    """Keys that name a model with weights: the random start, saved."""
    train(pairs, output_dir=str(pairs / "base"), max_steps=1, learning_rate=0.0, reference_free=True)
    return {"model_name_or_path": str(pairs / "base"), "continue_training": True}


def test_lora_trains_against_the_model_without_its_adapter(pairs, base):
    keys = (
        base
        | {"fine_tuning": "LoRA"}
        | {"max_steps": 15, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 15}
    )
    result = train(pairs, **keys)
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.history[-1]["reward_accuracy"] == 1.0 and result.history[-1]["loss"] < 0.5
    assert (pairs / "out" / "adapter_model.safetensors").is_file()
    cached = train(pairs, output_dir=str(pairs / "cached"), ref_logps_cache=str(pairs / "ref.npz"), **keys)
    for ours, theirs in zip(result.history, cached.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)


@pytest.fixture
def tuned(pairs, base):
    """A function from LoRA's keys to those of a run that continues an adapter, which was trained with them before."""

    def make(**more):
        given = base | {"fine_tuning": "LoRA"} | more
        sft = {"stage": "SFT", "max_seq_len": 128, "save_strategy": "no", "max_steps": 4, "learning_rate": 3e-2}
        (pairs / "sft.jsonl").write_text('{"src": ["1加2？"], "tgt": ["答案是3。"]}\n' * 8)
        keys = {"train_dataset_path": str(pairs / "sft.jsonl"), "output_dir": str(pairs / "sft")}
        erniekit.train(str(pairs / "run.yaml"), **given, **sft, **keys)
        return given | {"lora_path": str(pairs / "sft")}

    return make


@pytest.mark.parametrize(
    "more",
    [{}, pytest.param({"use_dora": True, "modules_to_save": "embed_tokens"}, marks=pytest.mark.slow)],
    ids=["plain", "dora"],
)
def test_an_adapter_that_is_continued_is_part_of_the_reference(pairs, tuned, more):
    keys = tuned(**more) | {"max_steps": 6, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 3}
    result = train(pairs, **keys, do_eval=True, sft_loss_ratio=0.5)
    first = result.history[0]
    assert first["loss_pref"] == pytest.approx(math.log(2), abs=1e-6) and first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result.history[-1]["kl"] != 0.0
    asked = {"stage": "DPO", "max_seq_len": 128, "sft_loss_ratio": 0.5} | keys
    own = evaluate(load(str(pairs / "run.yaml"), asked, "eval"))
    # The same, with both adapters merged into weights: two models, one before training and one after it.
    for name, adapter in (("before", "sft"), ("after", "out")):
        model = erniekit.load_model(keys["model_name_or_path"], adapter=pairs / adapter)
        lora.merge(model)
        erniekit.save_model(model, pairs / name)
    merged = {"model_name_or_path": str(pairs / "before"), "checkpoint": str(pairs / "after"), "lora_path": None}
    oracle = evaluate(load(str(pairs / "run.yaml"), asked | merged | {"fine_tuning": "Full"}, "eval"))
    for name in ("loss", "reward_margin", "logp_chosen", "kl"):
        assert own[name] == pytest.approx(oracle[name], rel=1e-3, abs=1e-5), name
        assert own[name] == pytest.approx(result.summary[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    # A resumed run has the same reference, and so has one whose log-probabilities were computed once.
    shutil.rmtree(pairs / "out" / "checkpoint-6")
    rest = train(pairs, **keys, do_eval=True, sft_loss_ratio=0.5)
    assert [record["loss"] for record in rest.history] == [record["loss"] for record in result.history[3:]]
    cached = train(
        pairs,
        **keys,
        sft_loss_ratio=0.5,
        output_dir=str(pairs / "cached"),
        ref_logps_cache=str(pairs / "ref.npz"),
    )
    for ours, theirs in zip(result.history, cached.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
    with pytest.raises(CheckpointError, match="another reference: lora_path was"):
        train(
            pairs, **(keys | {"lora_path": None}), output_dir=str(pairs / "x"), ref_logps_cache=str(pairs / "ref.npz")
        )


@pytest.mark.parametrize(
    "loss_type",
    "hinge ipo simpo or dpop sppo_hard nca_pair robust exo apo_zero apo_down".split(),
)
def test_every_loss_trains(pairs, loss_type):
    smoothing = 0.01 if loss_type in ("robust", "exo") else 0.0
    keys = {"loss_type": loss_type, "label_smoothing": smoothing, "max_steps": 6, "learning_rate": 1e-3}
    history = train(pairs, **keys).history
    assert all(math.isfinite(record["loss"]) for record in history)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_eval_compares_a_trained_model_with_the_one_it_came_from(pairs, base, fine_tuning, capsys):
    keys = base | {"fine_tuning": fine_tuning, "max_steps": 8, "do_eval": True, "sft_loss_ratio": 0.5}
    summary = train(pairs, **keys, save_strategy="steps").summary
    asked = {"stage": "DPO", "max_seq_len": 128, "sft_loss_ratio": 0.5, **base}
    results = evaluate(load(str(pairs / "run.yaml"), asked, "eval"))
    assert results["num_samples"] == 8
    for name in ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "kl"):
        assert results[name] == pytest.approx(summary[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    assert "reward accuracy" in capsys.readouterr().out


def test_eval_of_the_first_model_has_no_reference(pairs, base):
    results = evaluate(load(str(pairs / "run.yaml"), {"stage": "DPO", **base, "output_dir": str(pairs / "x")}, "eval"))
    assert results["reward_chosen"] == pytest.approx(0.1 * results["logp_chosen"], rel=1e-5)
    assert "kl" not in results


def test_a_reference_free_run_has_none(pairs):
    history = train(pairs, reference_free=True, max_steps=2).history
    assert "kl" not in history[0]
    assert history[0]["reward_chosen"] == pytest.approx(0.1 * history[0]["logp_chosen"], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"loss_type": "exo"}, ConfigError, "label_smoothing: loss_type: exo needs a value above 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, ConfigError, "loss_type: hinge has no label smoothing"),
        ({"loss_type": "sigmod"}, ConfigError, "loss_type: expected one of sigmoid"),
        ({"offset_alpha": 1.0, "loss_type": "ipo"}, ConfigError, "offset_alpha: only loss_type: sigmoid has an offset"),
        (
            {"ref_logps_cache": "x", "ref_model_update_steps": 1},
            ConfigError,
            "ref_logps_cache: a reference that changes",
        ),
        ({"stage": "VL-DPO", "ref_logps_cache": "x"}, ConfigError, "ref_logps_cache: not with stage: VL-DPO"),
        ({"pref_loss_ratio": 0}, ConfigError, "nothing is left to train on"),
        ({"train_dataset_type": "text"}, ConfigError, "stage: DPO reads pairs of answers"),
    ],
)
def test_wrong_keys_are_refused_before_anything_starts(pairs, keys, error, message):
    with pytest.raises(error, match=message):
        train(pairs, max_steps=1, **keys)
