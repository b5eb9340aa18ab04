"""Routing replay: the engine's record against whole passes of the model, and training passes that follow a record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.rl_runs import rl_workspace
from support.tiny_models import tiny_model

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.prompts import Prompt
from erniekit.generation.engine import Engine
from erniekit.generation.request import Generation, Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM, Routings
from erniekit.models.inputs import packed_inputs
from erniekit.moe.choices import RecordedChoices, join_layers, num_changed, table_dtype
from erniekit.training.forward_pass import ChunkRunner
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.rl.batches import BatchOptions, batch_of, microbatches
from erniekit.training.rl.completions import Completion, from_bytes, to_bytes
from erniekit.training.rl.expert_record import _as_bytes, _from_bytes, add_experts
from erniekit.training.run import train
from erniekit.utils.errors import ConfigError

PROMPTS = [Prompt([3, 9, 4, 7], [], None, {}, "a:1"), Prompt([5], [], None, {}, "a:2")]


@pytest.fixture
def model() -> CausalLM:
    return tiny_model("moe", num_hidden_layers=3)


def generated(model: CausalLM, max_running: int) -> list[Generation]:
    """Six answers to two prompts, up to two, or all, at a time."""
    engine = Engine(model, max_running, records_experts=True)
    answers = [
        engine.add(Request(PROMPTS[draw // 3].ids, Limits(3 + draw, 0, (2, 5)), Sampling(1.0, seed=2), draw))
        for draw in range(6)
    ]
    while not engine.is_idle:
        engine.step()
    return answers


def completions(model: CausalLM, answers: list[Generation]) -> list[Completion]:
    """The answers as completions of a rollout, with their record."""
    made = []
    for number, each in enumerate(answers):
        ids = np.array(each.answer.all_ids, np.int32)
        made.append(Completion(number // 3, number // 3, ids, ids >= 0, np.zeros(len(ids), np.float32), False))
    prompts = [PROMPTS[each.prompt] for each in made]
    add_experts(model, prompts, dict(enumerate(made)), {n: each.experts for n, each in enumerate(answers)})
    return made


def routings(model: CausalLM, batch: PackedBatch) -> Routings:
    return ChunkRunner(model, [batch]).run(0, 0, None)[1]


@pytest.mark.parametrize("max_running", [2, 8])
def test_the_engine_records_the_experts_of_a_pass_over_the_whole(model: CausalLM, max_running: int):
    """Rows join, leave and share prompts; the oracle runs each sequence alone, without a cache."""
    for each in generated(model, max_running):
        ids = np.array([[*each.request.prompt, *each.answer.all_ids]])
        wanted = model.model(packed_inputs(model, ids, np.ones_like(ids))).routings
        assert each.experts is not None and each.experts.shape == (ids.size - 1, 2, 2)
        for column, layer in enumerate((1, 2)):
            experts = wanted[layer, 0].routing.experts.numpy()[:-1]
            assert num_changed(each.experts[:, column], experts) == 0


def test_a_pass_sends_tokens_where_the_record_says(model: CausalLM):
    """Also where the routers have moved; weights are those of the present logits, and routers get gradients."""
    done = completions(model, generated(model, 8))
    batch = batch_of(done, PROMPTS.__getitem__)
    record = batch.completions.experts
    assert record is not None and record.shape == (batch.num_tokens, 2, 2) and record.dtype == np.uint8
    assert all(routed.changed == 0 for routed in routings(model, batch).values())
    for layer in (1, 2):
        gate = model.model.layers[layer].mlp.gate.weight
        gate.set_value(gate + paddle.randn(gate.shape))
    compared = batch_of(done, PROMPTS.__getitem__, BatchOptions(replays_experts=False))
    chosen = routings(model, compared)
    assert chosen[1, 0].changed == chosen[1, 0].disagreeing > 0
    model.train()
    hidden, decisions, _ = ChunkRunner(model, [batch]).run(0, 0, None)
    for column, layer in enumerate((1, 2)):
        routed = decisions[layer, 0]
        np.testing.assert_array_equal(routed.routing.experts.numpy(), record[:, column])
        assert routed.changed == 0 and routed.disagreeing is not None and routed.disagreeing > 0
        assert routed.usage.tolist() == np.bincount(record[:, column].reshape(-1), minlength=4).tolist()
        logits = np.take_along_axis(routed.routing.logits.numpy().astype(np.float64), record[:, column].astype(int), 1)
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(routed.routing.weights.numpy(), weights, rtol=1e-5)
    assert decisions[1, 0].disagreeing == chosen[1, 0].disagreeing  # what stands before this layer is the same
    hidden.square().sum().backward()
    assert np.abs(model.model.layers[1].mlp.gate.weight.grad.numpy()).max() > 0


def test_microbatches_take_the_record_apart_as_they_do_tokens(model: CausalLM):
    done = completions(model, generated(model, 8))
    for size in (1, 2, 4):
        for batch in microbatches(done, PROMPTS.__getitem__, size):
            assert all(routed.changed == 0 for routed in routings(model, batch).values())


def test_a_file_keeps_the_record(model: CausalLM):
    done = completions(model, generated(model, 8))
    again = from_bytes(to_bytes(done), "x")
    for one, two in zip(done, again, strict=True):
        for name in ("experts", "prompt_experts"):
            np.testing.assert_array_equal(vars(one)[name], vars(two)[name])
    assert again[0].prompt_experts is again[2].prompt_experts and again[0].prompt_experts is not None


def test_more_than_256_experts_take_two_bytes():
    assert (table_dtype(256), table_dtype(257)) == (np.uint8, np.uint16)
    table = np.array([[[3, 300]], [[511, 0]]], np.uint16)
    np.testing.assert_array_equal(_from_bytes(_as_bytes(table), table), table)


def test_the_layers_of_stages_are_put_in_order():
    """Two stages of an interleaved pipeline: layers 1 and 5 here, 3 and 7 there."""
    table = np.arange(8).reshape(1, 4, 2).astype(np.uint8)
    parts = [table[:, [0, 2]], table[:, [1, 3]]]
    np.testing.assert_array_equal(join_layers(parts, [[1, 5], [3, 7]]), table)
    choices = RecordedChoices(table, (1, 3, 5, 7))
    assert choices.of(5, None).tolist() == [[4, 5]] and choices.of(3, np.zeros(0, np.int64)).shape == (0, 2)


# --- runs of the trainer


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(LossPlot, "_draw", lambda self: None)
    monkeypatch.setattr(CompletionLog, "_draw", lambda self: None)
    return rl_workspace(tmp_path, "moe") | {"num_iterations": 2, "save_strategy": "no"}


def run(keys: dict[str, Any], name: str, **changes: object) -> list[dict[str, Any]]:
    directory = str(Path(keys["output_dir"]) / name)
    result = train(config.load(None, keys | {"output_dir": directory} | changes, "train"))
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if "loss" in step]


def test_replay_changes_nothing_where_both_computations_are_one(keys: dict[str, Any]):
    """The first update: later ones have moved routers, which replay is for."""
    plain, replayed = run(keys, "plain", max_steps=2), run(keys, "replayed", max_steps=2, router_replay="r3")
    assert "router/changed_fraction" not in plain[0]
    assert replayed[0]["router/changed_fraction"] == replayed[0]["router/disagreeing_fraction"] == 0
    for name in ("loss", "grad_norm", "entropy", "ratio/max"):
        assert replayed[0][name] == pytest.approx(plain[0][name], rel=1e-5, abs=1e-6), name


def test_other_experts_are_counted_and_replay_leaves_none(keys: dict[str, Any]):
    rounded = {"rollout_dtype": "bf16", "rollout_correction": "icepop"}
    compared = run(keys, "compared", router_replay="compare", **rounded)
    shares = [step["router/changed_fraction"] for step in compared]
    assert max(shares) > 0 and [step["router/disagreeing_fraction"] for step in compared] == shares
    replayed = run(keys, "replayed", router_replay="r3", **rounded)
    assert [step["router/changed_fraction"] for step in replayed] == [0.0] * 4
    assert max(step["router/disagreeing_fraction"] for step in replayed) > 0
    # Experts explain a part of the difference between the two computations; the rest is the rounding itself.
    largest = [max(s["rollout/logp_difference/max"] for s in steps) for steps in (replayed, compared)]
    assert largest[0] <= largest[1]


def test_a_run_resumed_between_the_steps_of_a_rollout_has_the_record(keys: dict[str, Any]):
    changes = {"router_replay": "r3", "rollout_dtype": "bf16", "save_strategy": "steps"}
    run(keys, "out", **changes)
    directory = Path(keys["output_dir"]) / "out"
    reader = Reader(directory)
    wanted = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    run(keys, "out", **changes, resume_from_checkpoint=f"{directory}/checkpoint-1")
    reader = Reader(directory)
    assert all((wanted[name] == reader.read(name)).all() for name in wanted)


def test_a_dense_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="router_replay: r3: the model is dense"):
        run(rl_workspace(tmp_path), "out", router_replay="r3")


def test_weights_that_a_cpu_cannot_generate_with_are_refused(keys: dict[str, Any]):
    with pytest.raises(ConfigError, match="emulate_precision: True: a CPU cannot generate with bf16 weights"):
        run(keys, "out", compute_type="bf16", emulate_precision=True)
