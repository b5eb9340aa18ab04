"""The policy loss of packed completions that share their prompt, against each completion run alone with Paddle's own
operators; generated log-probabilities and draws.
"""

from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.config.schema import Config
from erniekit.data.packed_batch import IGNORE, PackedBatch
from erniekit.data.prompts import Prompt
from erniekit.generation.engine import Engine
from erniekit.generation.request import Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.losses import policy_loss
from erniekit.models.inputs import ModelInputs
from erniekit.training.forward_pass import ChunkRunner
from erniekit.training.recipes.policy import PolicyRecipe, policy_options
from erniekit.training.rl.batches import BatchOptions, batch_of, microbatches, min_entropy_of
from erniekit.training.rl.completions import Completion, from_bytes, to_bytes
from erniekit.training.rl.generate import draw_number
from erniekit.utils.errors import CheckpointError

PROMPTS = [
    Prompt([3, 9, 4, 7], [], None, {}, "a:1"),
    Prompt([5], [], None, {}, "a:2"),
]


def completions(seed: int = 0, **columns: bool) -> list[Completion]:
    """Two groups of three completions with 1 to 5 tokens; one has results of tools in it."""
    rng = np.random.default_rng(seed)
    result = []
    for number in range(6):
        ids = rng.integers(3, 60, 1 + number % 5).astype(np.int32)
        is_sampled = np.ones(len(ids), bool)
        if number == 4:
            is_sampled[1:3] = False
        done = Completion(number // 3, number // 3, ids, is_sampled, np.full(len(ids), -4.0, np.float32), number == 2)
        done.advantage, done.reward = float(rng.normal()), float(rng.normal())
        done.rollout_logps = rng.normal(-4, 0.3, len(ids)).astype(np.float32)
        done.old_logps = done.rollout_logps + rng.normal(0, 0.4, len(ids)).astype(np.float32)
        done.reference_logps = done.old_logps + rng.normal(0, 0.2, len(ids)).astype(np.float32)
        result.append(done)
    return result


def gradients_of_recipe(model: Any, cfg: Config, batches: list[PackedBatch]) -> tuple[float, dict[str, np.ndarray]]:
    recipe = PolicyRecipe(cfg, model, None, None)  # type: ignore[arg-type]  # these terms need no loader
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in recipe.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    runner, total = ChunkRunner(model, batches), 0.0
    for number, batch in enumerate(batches):
        x_TD, _, inputs = runner.run(0, number, None)
        assert isinstance(inputs, ModelInputs)
        terms = recipe.head_terms(model, x_TD, inputs, batch)
        loss = sum(t.total / counts[t.divisor] * t.weight for t in terms.values() if t.weight is not None)
        loss.backward()
        total += float(loss)
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return total, found


def gradients_alone(model: Any, cfg: Config, done: list[Completion]) -> tuple[float, dict[str, np.ndarray]]:
    """The same by one pass of the public model for each completion, without sharing or packing."""
    width = max(c.num_sampled for c in done)
    columns: dict[str, list[Any]] = {name: [] for name in ("logps", "old", "ref", "rollout", "mask", "entropy")}
    for c in done:
        prompt = PROMPTS[c.prompt].ids
        logits = model(np.array([[*prompt, *c.ids[:-1]]]))[0, len(prompt) - 1 :] / cfg.temperature
        log_p = paddle.nn.functional.log_softmax(logits, axis=-1)
        chosen = np.flatnonzero(c.is_sampled)
        at = paddle.take_along_axis(log_p, paddle.to_tensor(c.ids.astype(np.int64)).unsqueeze(-1), 1).squeeze(-1)
        pad = paddle.zeros([width - len(chosen)])
        columns["logps"].append(paddle.concat([paddle.gather(at, paddle.to_tensor(chosen)), pad]))
        entropy = -(log_p.exp() * log_p).sum(-1)
        columns["entropy"].append(paddle.concat([paddle.gather(entropy, paddle.to_tensor(chosen)), pad]))
        for name, values in (("old", c.old_logps), ("ref", c.reference_logps), ("rollout", c.rollout_logps)):
            assert values is not None
            columns[name].append(paddle.concat([paddle.to_tensor(values[chosen]), pad]))
        columns["mask"].append(paddle.concat([paddle.ones([len(chosen)]), pad]))
    table = {name: paddle.stack(rows) for name, rows in columns.items()}
    loss = policy_loss(
        table["logps"],
        table["old"],
        paddle.to_tensor(np.array([c.advantage for c in done], np.float32)),
        table["mask"],
        ref_logps=table["ref"],
        rollout_logps=table["rollout"],
        entropy=table["entropy"],
        **policy_options(cfg),
    ).loss
    loss.backward()
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return float(loss), found


OPTIONS = [
    {"rl_loss_type": "gspo", "epsilon": 0.1, "epsilon_high": 0.1, "rollout_correction": "misc", "kl_coef": 0.3},
    {"rl_loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "rollout_correction": "icepop", "entropy_coef": 0.1},
    {"rl_loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.2, "temperature": 0.6, "kl_coef": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["rl_loss_type"])
@pytest.mark.parametrize("size", [6, 4, 1])
def test_packed_completions_have_the_loss_and_gradients_of_each_alone(options: dict, size: int):
    """Whole, cut through a group, and one by one. Tolerance: fp32 sums in another order."""
    model = tiny_model(initializer_range=0.1)
    model.train()
    cfg = Config(**({"temperature": 1.0, "max_completion_length": 6} | options))
    done = completions()
    batches = microbatches(done, PROMPTS.__getitem__, size)
    loss, found = gradients_of_recipe(model, cfg, batches)
    wanted_loss, wanted = gradients_alone(model, cfg, done)
    assert loss == pytest.approx(wanted_loss, abs=2e-6)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-6, err_msg=name)


def test_ranks_divide_the_completions_of_a_step():
    done = completions()
    for world in (2, 3):
        parts = [microbatches(done, PROMPTS.__getitem__, 2, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        advantages = [b.completions.advantages for m in zip(*parts, strict=True) for b in m]
        np.testing.assert_allclose(np.concatenate(advantages), [np.float32(c.advantage) for c in done])


def test_a_batch_shares_prompts_and_labels_what_the_policy_chose():
    done = completions()
    batch = batch_of(done, PROMPTS.__getitem__)
    assert batch.num_tokens == 3 + sum(len(c.ids) for c in done)  # the second prompt has one token, which all repeat
    assert batch.completions.prompts.tolist() == [0, 0, 0, -1, -1, -1]
    labels = np.concatenate([c.ids[c.is_sampled] for c in done])
    assert batch.labels[batch.supervised].tolist() == labels.tolist()
    assert (batch.labels[:3] == IGNORE).all() and batch.position_ids[:4].tolist() == [0, 1, 2, 3]
    cut = batch_of(done, PROMPTS.__getitem__, BatchOptions(mask_truncated=True))
    assert cut.completions.lengths.tolist() == [1, 2, 0, 4, 3, 1]


def test_pairs_are_the_best_and_the_worst_of_a_group():
    done = completions()
    for c, reward in zip(done, (0.0, 1.0, 3.0, 0.5, float("nan"), 0.5), strict=True):
        c.reward = reward
    assert batch_of(done, PROMPTS.__getitem__, BatchOptions(pair_margin=0.0)).completions.pairs.tolist() == [[2, 0]]
    masked = BatchOptions(mask_truncated=True, pair_margin=0.5)
    assert batch_of(done, PROMPTS.__getitem__, masked).completions.pairs.tolist() == [[1, 0]]
    assert not len(batch_of(done, PROMPTS.__getitem__, BatchOptions(pair_margin=3.0)).completions.pairs)


def test_the_least_entropy_is_a_quantile_of_the_step():
    done = completions()
    entropies = [np.linspace(0, 1, len(c.ids)).astype(np.float32) for c in done]
    values = np.concatenate([part[c.is_sampled] for part, c in zip(entropies, done, strict=True)])
    assert min_entropy_of(done, entropies, 0.2, BatchOptions()) == pytest.approx(np.quantile(values, 0.8), abs=2e-5)


def test_a_file_of_completions_is_read_as_it_was():
    done = completions()
    again = from_bytes(to_bytes(done), "x")
    for one, two in zip(done, again, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, vars(two)[name])
    for cut in (0, 10, 200):
        with pytest.raises(CheckpointError, match="x: cannot be read"):
            from_bytes(to_bytes(done)[:cut], "x")


def test_draws_of_samples_have_numbers_of_their_own():
    numbers = {
        draw_number(step, prompt, times, sample)
        for step in range(3)
        for prompt in range(5)
        for times in range(2)
        for sample in range(4)
    }
    assert len(numbers) == 3 * 5 * 2 * 4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generated_log_probabilities_are_those_of_training(temperature: float):
    """Cached decoding in fp32 against one pass over the whole; what else runs changes no draw."""
    model = tiny_model("moe")
    sampling = Sampling(temperature=temperature, seed=4)
    found = {}
    for max_running in (1, 16):
        engine = Engine(model, max_running)
        running = [
            engine.add(
                Request([3, 8, 1], Limits(6, 0, (2, 5)), sampling, draw, num_scores=0, score_temperature=temperature)
            )
            for draw in range(12)
        ]
        while not engine.is_idle:
            engine.step()
        found[max_running] = [(g.answer.all_ids, [s.logprob for s in g.answer.scores]) for g in running]
    assert [ids for ids, _ in found[1]] == [ids for ids, _ in found[16]]
    assert any(ids[-1] in (2, 5) for ids, _ in found[1])
    for ids, log_probs in found[16]:
        assert not {2, 5} & set(ids[:-1])
        logits = model(np.array([[3, 8, 1, *ids[:-1]]]))[0, 2:] / temperature
        log_p = paddle.nn.functional.log_softmax(logits, axis=-1).numpy()
        np.testing.assert_allclose(log_probs, log_p[np.arange(len(ids)), ids], atol=2e-5)
