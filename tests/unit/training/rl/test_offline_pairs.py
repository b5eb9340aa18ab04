"""Offline UPO: pairs of answers that were made in advance beside the completions of a rollout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.rl_runs import rl_workspace
from support.tiny_directories import write_lines
from support.tiny_models import tiny_model

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.config.schema import Config
from erniekit.data.chat.pairs import join_pair
from erniekit.data.packed_batch import IGNORE, Document, PackedBatch
from erniekit.training.forward_pass import ChunkRunner
from erniekit.training.recipes.policy import PolicyRecipe
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.rl.batches import microbatches
from erniekit.training.rl.completions import Completion
from erniekit.training.rl.loader import OFFLINE
from erniekit.training.rl.offline_pairs import OfflinePairs
from erniekit.training.run import train
from erniekit.utils.errors import CheckpointError, ConfigError, DataError

BETA, WEIGHT = 0.3, 0.7


def document(prompt: list[int], chosen: list[int], rejected: list[int]) -> Document:
    """A pair whose last tokens are end tokens that nothing predicts from."""

    def side(answer: list[int]) -> Document:
        ids = np.array([*prompt, *answer], np.int32)
        labels = np.append(ids[1:], IGNORE).astype(np.int32)
        labels[: len(prompt) - 1] = IGNORE
        return Document(ids[:-1], labels[:-1])

    return join_pair(side(chosen), side(rejected), 1.0)


@pytest.fixture
def pairs() -> OfflinePairs:
    documents = [
        document([3, 9, 4], [11, 12, 2], [13, 2]),
        document([5], [21, 2], [22, 23, 24, 2]),
        document([6, 7], [31, 2], [32, 2]),
    ]
    return OfflinePairs(documents, ["p:1", "p:2", "p:3"], seed=1)


def test_a_pair_becomes_two_completions_of_its_prompt(pairs: OfflinePairs):
    done = pairs.draw(0, 3)
    assert sorted(c.prompt for c in done) == [0, 0, 1, 1, 2, 2] and [c.group for c in done] == [0, 0, 1, 1, 2, 2]
    found = {c.prompt: (pairs.prompt(c.prompt).ids, c.ids.tolist()) for c in done if c.reward == 1}
    assert found == {0: ([3, 9, 4], [11, 12, 2]), 1: ([5], [21, 2]), 2: ([6, 7], [31, 2])}
    assert [c.ids.tolist() for c in done if c.reward == 0 and c.prompt == 1] == [[22, 23, 24, 2]]
    assert all(c.is_sampled.all() for c in done)


def test_every_pair_comes_once_in_an_epoch(pairs: OfflinePairs):
    numbers = [c.prompt for c in pairs.draw(0, 9)][::2]
    assert all(sorted(numbers[start : start + 3]) == [0, 1, 2] for start in (0, 3, 6))
    assert [c.prompt for c in pairs.draw(4, 2)][::2] == numbers[4:6], "the place alone decides"


def recipe_loss(model: Any, cfg: Config, batches: list[PackedBatch]) -> paddle.Tensor:
    recipe = PolicyRecipe(cfg, model, None, None)  # type: ignore[arg-type]  # these terms need no loader
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in recipe.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    assert counts["sequences"] == counts["loss_tokens"] == counts["pairs"] == 0
    runner, total = ChunkRunner(model, batches), paddle.zeros([])
    for number, batch in enumerate(batches):
        x_TD, _, inputs = runner.run(0, number, None)
        terms = recipe.head_terms(model, x_TD, inputs, batch)
        assert set(terms) == {"upo_offline", "upo_offline/accuracy", "upo_offline/margin"}
        for term in terms.values():
            if term.weight is not None:
                total = total + term.total / counts[term.divisor] * term.weight
    return total


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> paddle.Tensor:
    """Of a whole answer, by one pass of the public model over it alone."""
    logits = model(np.array([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
    log_p = paddle.nn.functional.log_softmax(logits, axis=-1)
    return paddle.take_along_axis(log_p, paddle.to_tensor(np.array(answer)).unsqueeze(-1), 1).sum()


@pytest.mark.parametrize("size", [2, 6])
def test_the_loss_is_that_of_the_formula(pairs: OfflinePairs, size: int):
    """Value and gradients against each answer alone, and one direction by finite differences."""
    model = tiny_model(initializer_range=0.1)
    model.train()
    done, rng = pairs.draw(0, 3), np.random.default_rng(2)
    for c in done:
        c.reference_logps = rng.normal(-4, 0.3, len(c.ids)).astype(np.float32)
    cfg = Config(upo_offline_weight=WEIGHT, upo_beta=BETA, temperature=1.0, upo_reference="ref")
    batches = microbatches(done, pairs.prompt, size, options=OFFLINE)
    loss = recipe_loss(model, cfg, batches)
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.clear_gradients()

    wanted = paddle.zeros([])
    for better, worse in zip(done[::2], done[1::2], strict=True):
        sides = [
            log_prob(model, pairs.prompt(c.prompt).ids, c.ids.tolist()) - float(c.reference_logps.sum())
            for c in (better, worse)
        ]
        wanted = wanted + paddle.log1p(paddle.exp(-BETA * (sides[0] - sides[1]))) / 3 * WEIGHT
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), abs=1e-6)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(found[name], p.grad.numpy(), atol=2e-6, err_msg=name)

    name, weight = max(model.named_parameters(), key=lambda item: np.abs(found[item[0]]).max())
    before, direction, step = weight.numpy(), np.sign(found[name]), 1e-3
    values = []
    for sign in (1, -1):
        weight.set_value(before + sign * step * direction)
        values.append(float(recipe_loss(model, cfg, batches)))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((found[name] * direction).sum()), rel=2e-2)


def test_a_rank_without_pairs_has_the_same_terms(pairs: OfflinePairs):
    """Three pairs over two ranks: the second one has one microbatch without any."""
    model = tiny_model()
    done = pairs.draw(0, 3)
    for c in done:
        c.old_logps = np.zeros(len(c.ids), np.float32)
    cfg = Config(upo_offline_weight=WEIGHT, temperature=1.0, upo_reference="old")
    parts = [microbatches(done, pairs.prompt, 2, rank, 2, OFFLINE) for rank in (0, 1)]
    assert [len(batch.completions) for part in parts for batch in part] == [2, 2, 2, 0]
    recipe = PolicyRecipe(cfg, model, None, None)  # type: ignore[arg-type]
    batch = parts[1][1]
    x_TD, _, inputs = ChunkRunner(model, [batch]).run(0, 0, None)
    terms = recipe.head_terms(model, x_TD, inputs, batch)
    assert set(terms) == {"upo_offline", "upo_offline/accuracy", "upo_offline/margin"}
    assert float(terms["upo_offline"].total) == 0


# --- runs of the trainer


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(LossPlot, "_draw", lambda self: None)
    monkeypatch.setattr(CompletionLog, "_draw", lambda self: None)
    write_lines(
        tmp_path / "pairs.jsonl",
        [{"src": [f"{n}+1="], "response": [str(n + 1), str(n)], "sort": [1, 0]} for n in range(5)],
    )
    return rl_workspace(tmp_path) | {
        "batch_size": 4,
        "upo_offline_weight": 0.5,
        "upo_offline_path": str(tmp_path / "pairs.jsonl"),
        "upo_offline_pairs": 3,
    }


def run(keys: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    result = train(config.load(None, keys | changes, "train"))
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return [step for step in map(json.loads, lines) if "loss" in step]


def test_a_run_with_both_forms_of_upo_resumes_between_the_steps_of_a_rollout(keys: dict[str, Any]):
    changes = {"upo_weight": 0.1, "upo_reference": "old", "num_iterations": 2}
    steps = run(keys, **changes)
    for step in steps:
        total = step["loss_policy"] + 0.1 * step["loss_upo"] + 0.5 * step["loss_upo_offline"]
        assert step["loss"] == pytest.approx(total, abs=1e-6)
    assert steps[0]["loss_upo_offline"] == pytest.approx(np.log(2), abs=1e-5), "the policy is the anchor"
    assert steps[2]["loss_upo_offline"] < steps[0]["loss_upo_offline"], "the same pairs once more"
    reader = Reader(Path(keys["output_dir"]))
    wanted = {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118
    there = Path(keys["output_dir"]) / "checkpoint-1"
    assert run(keys, **changes, resume_from_checkpoint=str(there))[-1]["loss"] == steps[-1]["loss"]
    reader = Reader(Path(keys["output_dir"]))
    assert all((wanted[name] == reader.read(name)).all() for name in wanted)
    (Path(keys["output_dir"]) / "checkpoint-1" / "rollout_pairs.npz").unlink()
    with pytest.raises(CheckpointError, match=r"rollout_pairs\.npz is missing"):
        run(keys, **changes, resume_from_checkpoint=str(there))


def test_offline_pairs_alone_need_a_reference(keys: dict[str, Any]):
    steps = run(keys, save_strategy="no", max_steps=2)
    assert "loss_upo" not in steps[0] and steps[0]["loss_upo_offline"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upo_offline_path": ""}, "upo_offline_path: needed with upo_offline_weight"),
        ({"batch_size": 3}, "batch_size: 3: upo_offline_weight puts both answers"),
        ({"upo_offline_type": "erniekit,alpaca"}, "upo_offline_type: 2 formats for 1 entry"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config.load(None, keys | changes, "train")


def test_pairs_that_are_too_long_or_wrong_are_named(keys: dict[str, Any], tmp_path: Path):
    file = Path(keys["upo_offline_path"])
    file.write_text('{"src": ["a"], "response": ["b", "b"], "sort": [1, 0]}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:1"):
        run(keys)
    file.write_text(json.dumps({"src": ["a" * 300], "response": ["b", "c"], "sort": [1, 0]}) + "\n")
    with pytest.raises(DataError, match="upo_offline_path: none of 1 pair can be used"):
        run(keys)


def test_completions_of_pairs_have_no_generated_log_probabilities(pairs: OfflinePairs):
    assert all(isinstance(c, Completion) and np.isnan(c.rollout_logps).all() for c in pairs.draw(0, 3))
