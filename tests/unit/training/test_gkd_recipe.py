"""Distillation from a teacher: its divergence over answers, and answers of the model in place of the data's."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.whole_model import run_step

from erniekit.config import Config
from erniekit.data.packed_batch import IGNORE, Document, join_rows, make_row
from erniekit.generation.decode import decode
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.training.recipes.distilled import Teacher
from erniekit.training.recipes.gkd import GkdRecipe
from erniekit.utils import log


def document(seed, prompt=4, answer=3):
    ids = np.random.default_rng(seed).integers(3, 61, prompt + answer)
    labels = np.full(len(ids), IGNORE)
    labels[prompt - 1 : -1] = ids[prompt:]
    return Document(ids.astype(np.int32), labels.astype(np.int32))


DOCUMENTS = [document(0), document(1, 2, 5), document(2, 5, 2)]


def batch_of(*rows):
    return join_rows([make_row([DOCUMENTS[i] for i in row], [f"a:{i}" for i in row]) for row in rows])


def recipe_of(model, teacher, **keys):
    keys = {"lmbda": 0.0, "gkd_beta": 0.5, "temperature": 0.9, "max_new_tokens": 4, "max_seq_len": 64} | keys
    cfg = Config(stage="GKD", moe_aux_loss_lambda=0.0, **keys)
    return GkdRecipe(cfg, model, Teacher(teacher), [2])


def written_out(model, teacher, ids, places, beta, temperature):
    """The sum of the generalised Jensen-Shannon divergence at `places` of one row."""
    row = np.asarray(ids, np.int64)[None]
    log_softmax = paddle.nn.functional.log_softmax
    own = log_softmax(model(row)[0] / temperature, axis=-1)
    with paddle.no_grad():
        other = log_softmax(teacher(row)[0] / temperature, axis=-1)
    p, r = own.exp(), other.exp()
    mixture = (beta * r + (1 - beta) * p).log()
    divergence = beta * (r * (other - mixture)).sum(-1) + (1 - beta) * (p * (own - mixture)).sum(-1)
    return divergence[paddle.to_tensor(places)].sum()


def test_loss_and_gradients_are_those_of_separate_rows():
    model, teacher = tiny_model("dense", seed=3), tiny_model("dense", seed=4)
    recipe = recipe_of(model, teacher)
    sums = run_step(recipe.cfg, model, recipe, [batch_of([0, 1]), batch_of([2])])
    ours = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    places = [np.flatnonzero(d.labels != IGNORE) for d in DOCUMENTS]
    totals = [written_out(model, teacher, d.ids, at, 0.5, 0.9) for d, at in zip(DOCUMENTS, places, strict=True)]
    expected = paddle.add_n(totals) / sum(map(len, places))
    assert sums.loss == pytest.approx(float(expected), rel=1e-5)
    assert sums.metrics["on_policy"] == 0.0
    expected.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            atol = 1e-5 * float(np.abs(p.grad.numpy()).max())
            np.testing.assert_allclose(ours[name], p.grad.numpy(), rtol=0, atol=atol, err_msg=name)


def test_on_policy_steps_train_on_the_models_own_answers():
    model, teacher = tiny_model("dense", seed=3), tiny_model("dense", seed=4)
    recipe = recipe_of(model, teacher, lmbda=1.0, top_p=1.0)
    recipe.before_step(5)
    batches = recipe.prepare([batch_of([0, 1]), batch_of([2])])
    prompts = [DOCUMENTS[0].ids[:4].tolist(), DOCUMENTS[1].ids[:2].tolist(), DOCUMENTS[2].ids[:5].tolist()]
    documents = [d for batch in batches for d in np.split(batch.input_ids, np.cumsum(batch.segment_lengths)[:-1])]
    assert [d[: len(p)].tolist() for d, p in zip(documents, prompts, strict=True)] == prompts
    assert [batch.sources for batch in batches] == [["a:0", "a:1"], ["a:2"]]
    for batch in batches:  # every token behind a prompt is supervised, and predicts the next one
        places = batch.supervised
        np.testing.assert_array_equal(batch.labels[places], batch.input_ids[places + 1])
    again = recipe.prepare([batch_of([0], [1], [2])])[0]
    np.testing.assert_array_equal(again.input_ids, np.concatenate([batch.input_ids for batch in batches]))
    recipe.before_step(6)
    assert recipe.prepare([batch_of([0], [1], [2])])[0].input_ids.tolist() != again.input_ids.tolist()


def test_answers_are_those_of_decode_at_temperature_and_limits():
    model = tiny_model("dense", seed=3)
    recipe = recipe_of(model, tiny_model("dense", seed=4), lmbda=1.0, top_k=1, max_new_tokens=3)
    [batch] = recipe.prepare([batch_of([0])])
    [answer] = decode(model, [DOCUMENTS[0].ids[:4].tolist()], Limits(3, 0, (2,)), Sampling(temperature=0))
    assert batch.input_ids[4:].tolist() == answer.all_ids


def test_a_question_that_fills_the_context_keeps_the_answer_of_the_data():
    """truncation: cut may leave one token of the answer, which the last token of the context predicts."""
    model, teacher = (tiny_model("dense", seed=seed, max_position_embeddings=16) for seed in (3, 4))
    recipe = recipe_of(model, teacher, lmbda=1.0, max_seq_len=16)
    full = document(5, 16, 1)
    full = Document(full.ids[:16], np.append(full.labels[:15], full.ids[16]).astype(np.int32))
    recipe.before_step(0)
    with log.captured() as lines:
        batch = recipe.prepare([join_rows([make_row([full, DOCUMENTS[0]], ["a:1", "a:2"])])])[0]
    (is_warning, line), *more = [each for each in lines if "a:" in each[1]]
    assert is_warning and line.startswith("a:1: the question fills the model's context") and not more
    assert batch.input_ids[:16].tolist() == full.ids.tolist() and batch.labels[:16].tolist() == full.labels.tolist()
    assert batch.segment_lengths[1] == 4 + 4 and batch.sources[:2] == ["a:1", "a:2"]


def test_the_share_of_on_policy_steps_is_lmbda():
    model = tiny_model("dense", seed=3)
    recipe = recipe_of(model, tiny_model("dense", seed=4), lmbda=0.3)
    share = np.mean([recipe.is_on_policy(step) for step in range(2000)])
    assert abs(share - 0.3) < 0.04  # four standard deviations


def test_the_last_answer_of_several_is_generated_again():
    ids = np.arange(3, 15, dtype=np.int32)
    labels = np.full(12, IGNORE, np.int32)
    labels[3:5], labels[8:11] = ids[4:6], ids[9:12]
    model = tiny_model("dense", seed=3)
    recipe = recipe_of(model, tiny_model("dense", seed=4), lmbda=1.0)
    [batch] = recipe.prepare([make_row([Document(ids, labels)], ["a:1"])])
    assert batch.input_ids[:9].tolist() == ids[:9].tolist()
    assert batch.supervised[0] == 8
