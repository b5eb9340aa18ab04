"""Scores equal the plain formula on the full logits, whatever the packing."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from support.packed import packed
from support.tiny_models import tiny_model
from support.tiny_sizes import DENSE

from erniekit.data.packed_batch import PackedBatch
from erniekit.losses import lm
from erniekit.losses.log_probs import token_log_probs
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs
from erniekit.models.scoring import Score, score_hidden

V = DENSE["vocab_size"]


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(request.param)


def rows() -> dict[str, np.ndarray]:
    """Three rows: two documents and padding; one document; one document whose segment id is that of the row before."""
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] * 7 + [0] * 5])
    positions = np.array([[*range(5), *range(4), 0, 0, 0], [*range(12)], [*range(7), 0, 0, 0, 0, 0]])
    rng = np.random.default_rng(0)
    ids = np.where(segments > 0, rng.integers(3, V, segments.shape), 0)
    labels = np.where((segments > 0) & (rng.random(segments.shape) < 0.7), rng.integers(3, V, segments.shape), -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "segment_ids": segments}


def by_formula(model: CausalLM, ids: np.ndarray, labels: np.ndarray) -> Score:
    """-log softmax at each label of a row of one document, in float64."""
    logits = model(ids[None]).numpy()[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.flatnonzero(labels != -100)
    return Score(-log_p[at, labels[at]].sum(), len(at), int((logits.argmax(-1)[at] == labels[at]).sum()))


def batch_nll(model: CausalLM, batch: PackedBatch) -> Score:
    hidden = model.model(batch_inputs(model, batch)).normed
    return score_hidden(model, hidden, batch.supervised, batch.labels[batch.supervised])


def test_a_packed_batch_scores_as_its_documents_alone(model: CausalLM):
    batch = rows()
    logits = model(batch["input_ids"], batch["position_ids"], batch["segment_ids"]).numpy()[0]
    second, first = np.sort(logits, axis=-1)[:4, -2:].T
    # An untrained model is right too rarely to test the count; rounding decides where two tokens are equally likely.
    clear = np.argsort(second - first)[:3]
    batch["labels"][0, clear] = logits[clear].argmax(-1)
    expected = Score()
    for row, segment in ((0, 1), (0, 2), (1, 1), (2, 1)):
        at = batch["segment_ids"][row] == segment
        expected += by_formula(model, batch["input_ids"][row, at], batch["labels"][row, at])
    found = batch_nll(model, packed(**batch))
    assert found.num_tokens == expected.num_tokens == (batch["labels"] != -100).sum()
    assert found.num_correct == expected.num_correct >= 3
    assert found.sum_nll == pytest.approx(expected.sum_nll, rel=1e-5)


def test_chunks_change_nothing(model: CausalLM, monkeypatch: pytest.MonkeyPatch):
    whole = batch_nll(model, packed(**rows()))
    monkeypatch.setattr(lm, "_CHUNK_ELEMENTS", 2 * V)
    assert batch_nll(model, packed(**rows())) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_for_the_device_changes_nothing(model: CausalLM, monkeypatch: pytest.MonkeyPatch, multiple: int):
    batch = packed(**rows())
    alone = batch_nll(model, batch)
    monkeypatch.setattr(CausalLM, "token_multiple", multiple)
    assert batch_nll(model, batch) == pytest.approx(alone, rel=1e-6)


def test_positions_are_honoured(model: CausalLM):
    batch = rows()
    shifted = batch_nll(model, packed(**batch | {"position_ids": batch["position_ids"] * 2}))
    assert abs(shifted.sum_nll - batch_nll(model, packed(**batch)).sum_nll) > 1e-3


def test_nothing_to_score_is_zero_not_nan(model: CausalLM):
    batch = rows()
    assert batch_nll(model, packed(**batch | {"labels": np.full_like(batch["labels"], -100)})) == Score(0.0, 0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_not_hidden(value: float):
    broken = tiny_model()
    weight = broken.model.norm.weight
    weight.set_value(np.full(weight.shape, value, dtype=np.float32))
    assert np.isnan(batch_nll(broken, packed(**rows())).sum_nll)


def test_a_loss_beyond_64_nats_is_the_same_in_training_and_evaluation():
    """Paddle's CPU kernel takes no logit for more than 64 below the largest."""
    random = np.random.default_rng(0)
    hidden, weight = random.normal(size=(9, 8)).astype(np.float32), 40 * random.normal(size=(8, V)).astype(np.float32)
    labels = random.integers(0, V, 9)
    logits = hidden.astype(np.float64) @ weight.astype(np.float64)
    highest = logits.max(axis=-1)
    nll = np.log(np.exp(logits - highest[:, None]).sum(axis=-1)) + highest - logits[np.arange(9), labels]
    assert (nll > 64).sum() >= 3 and (nll < 64).any()
    head = lm.Head(paddle.to_tensor(weight), by_vocab=False)
    trained, *_ = lm.linear_cross_entropy(paddle.to_tensor(hidden), head, paddle.to_tensor(labels), paddle.ones([9]))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=V), head=head.logits)
    scored = score_hidden(model, paddle.to_tensor(hidden), np.arange(9), labels)
    preferred = token_log_probs(paddle.to_tensor(hidden), head, paddle.to_tensor(labels), 100)
    assert trained.item() == pytest.approx(nll.sum(), rel=1e-5)
    assert scored.sum_nll == pytest.approx(nll.sum(), rel=1e-5)
    np.testing.assert_allclose(-preferred.numpy(), nll, rtol=1e-5)
