"""The KTO recipe against the loss written out over separate rows: its loss, its divergence, its gradients."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.whole_model import run_step

from erniekit.config import Config
from erniekit.data.packed_batch import IGNORE, Document, join_rows, make_row
from erniekit.parallel.mesh import Mesh
from erniekit.training.evaluators import EvaluatedModel
from erniekit.training.judged_evaluator import judged_scores
from erniekit.training.mismatched import mismatched_batches
from erniekit.training.recipes.kto import KtoRecipe
from erniekit.training.reference import PairScorer, SecondModel

SIZES = [(5, 4, True), (3, 6, False), (2, 3, True), (4, 2, False)]  # prompt, answer, judgement


def document(prompt, answer, is_good, seed):
    ids = np.random.default_rng(seed).integers(3, 61, prompt + answer)
    labels = np.full(len(ids), IGNORE)
    labels[prompt - 1 : -1] = ids[prompt:]
    return Document(ids.astype(np.int32), labels.astype(np.int32), is_good=is_good)


DOCUMENTS = [document(*sizes, seed) for seed, sizes in enumerate(SIZES)]


def batch_of(*rows):
    """Rows of numbers of DOCUMENTS."""
    return join_rows([make_row([DOCUMENTS[i] for i in row], [f"a:{i}" for i in row]) for row in rows])


def recipe_of(model, reference, **keys):
    scorer = PairScorer(100)
    cfg = Config(stage="KTO", moe_aux_loss_lambda=0.0, **({"max_seq_len": 64} | keys))
    return KtoRecipe(cfg, model, scorer, SecondModel(reference, scorer))


def log_prob(model, prompt, answer):
    """log p(answer | prompt) by a plain log-softmax over one row."""
    row = np.concatenate([prompt, answer]).astype(np.int64)
    log_p = paddle.nn.functional.log_softmax(model(row[None])[0], axis=-1)
    places = np.arange(len(prompt) - 1, len(row) - 1)
    return log_p[paddle.to_tensor(places), paddle.to_tensor(row[places + 1])].sum()


def parts(number):
    prompt = SIZES[number][0]
    return DOCUMENTS[number].ids[:prompt], DOCUMENTS[number].ids[prompt:]


def divergence_of(model, reference, numbers):
    with paddle.no_grad():
        ratios = []
        for i, other in zip(numbers, [numbers[-1], *numbers[:-1]], strict=True):
            prompt, answer = parts(i)[0], parts(other)[1]
            ratios.append(float(log_prob(model, prompt, answer) - log_prob(reference, prompt, answer)))
    return max(float(np.mean(ratios)), 0.0)


def gradients_of(model):
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


@pytest.mark.parametrize(("seeds", "is_positive"), [((3, 4), False), ((4, 3), True)])
def test_loss_divergence_and_gradients_are_those_of_separate_rows(seeds, is_positive):
    model, reference = tiny_model("dense", seed=seeds[0]), tiny_model("dense", seed=seeds[1])
    recipe = recipe_of(model, reference, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    sums = run_step(recipe.cfg, model, recipe, [batch_of([0, 1], [2]), batch_of([3])])
    ours = gradients_of(model)
    kl = divergence_of(model, reference, [0, 1, 2, 3])
    with paddle.no_grad():
        other = [float(log_prob(reference, *parts(i))) for i in range(4)]
    ratios = [log_prob(model, *parts(i)) - other[i] for i in range(4)]
    losses = [
        1.5 * (1 - paddle.nn.functional.sigmoid(0.3 * (h - kl)))
        if good
        else 0.7 * (1 - paddle.nn.functional.sigmoid(0.3 * (kl - h)))
        for h, (_, _, good) in zip(ratios, SIZES, strict=True)
    ]
    expected = paddle.add_n(losses) / 4
    assert sums.loss == pytest.approx(float(expected), rel=1e-5)
    assert sums.metrics["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert (kl > 0) == is_positive
    for name, numbers in (("reward_good", (0, 2)), ("reward_bad", (1, 3))):
        assert sums.metrics[name] == pytest.approx(0.3 * np.mean([float(ratios[i]) for i in numbers]), rel=1e-4)
    expected.backward()
    for name, gradient in gradients_of(model).items():
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def test_how_rows_are_split_changes_nothing():
    model, reference = tiny_model(seed=3), tiny_model(seed=4)
    results = []
    for batches in ([batch_of([0], [1], [2], [3])], [batch_of([0, 1]), batch_of([2], [3]), join_rows([])]):
        recipe = recipe_of(model, reference)
        sums = run_step(recipe.cfg, model, recipe, batches)
        results.append((sums.loss, sums.metrics, gradients_of(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4)
    for name, gradient in results[1][2].items():
        np.testing.assert_allclose(gradient, results[0][2][name], rtol=0, atol=1e-5 * np.abs(gradient).max())


def test_prompts_get_the_answers_of_the_documents_before():
    [first, second] = mismatched_batches([batch_of([0, 1]), batch_of([2])], Mesh.single(), 64)
    assert first.num_samples == 2 and second.num_samples == 1 and first.sources == ["a:0", "a:1"]
    expected = np.concatenate([parts(0)[0], parts(2)[1], parts(1)[0], parts(0)[1]])
    np.testing.assert_array_equal(first.input_ids, expected)
    assert first.answer_labels.tolist() == [3.0, 4.0] and second.answer_labels.tolist() == [6.0]
    [cut] = mismatched_batches([batch_of([0, 1])], Mesh.single(), 7)
    assert np.diff(np.flatnonzero(np.diff(cut.segment_ids, prepend=-1))).tolist() == [7]
    [alone] = mismatched_batches([batch_of([0])], Mesh.single(), 64)
    assert alone.num_tokens == 0


def test_the_evaluation_is_the_loss_over_all_answers():
    model, reference = tiny_model(seed=3), tiny_model(seed=4)
    recipe = recipe_of(model, reference, beta=0.3)
    whole = run_step(recipe.cfg, model, recipe, [batch_of([0], [1], [2], [3])])
    evaluated = EvaluatedModel("m", recipe.cfg, model, recipe.reference)
    batches = [batch_of([0, 1]), batch_of([2]), batch_of([3])]
    scores = judged_scores(evaluated, cast(Any, SimpleNamespace(batches=lambda most: (batch for batch in batches))))
    assert scores.metrics["loss"] == pytest.approx(whole.loss, rel=1e-5)
    for name in ("kl", "reward_good", "reward_bad"):
        assert scores.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4, abs=1e-6)
    assert scores.counts == {"num_samples": 4}
    assert scores.metrics["margin"] == pytest.approx(scores.metrics["reward_good"] - scores.metrics["reward_bad"])


@pytest.mark.parametrize(
    ("keys", "is_warned"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 2}, False),
        ({"batch_size": 2}, False),
        ({"kto_loss_type": "apo_zero_unpaired"}, False),
    ],
)
def test_a_step_of_one_answer_is_warned_of(capsys, keys, is_warned):
    model, reference = tiny_model(seed=3), tiny_model(seed=4)
    cfg = Config(stage="KTO", batch_size=1, gradient_accumulation_steps=1, packing=False)
    prepared = SimpleNamespace(build=lambda mesh, chunks: reference)
    KtoRecipe.build(cast(Any, SimpleNamespace(cfg=replace(cfg, **keys), model=model, prepared=prepared)))
    assert ("warning: kto_loss_type: kto: a step has one answer" in capsys.readouterr().err) == is_warned
