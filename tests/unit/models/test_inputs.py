"""What the first layer takes, from packed documents."""

import dataclasses

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG

from erniekit.data.packed_batch import Document, PackedBatch, PairLayout, join_rows, make_row
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs, embed_ahead, packed_inputs, padded_length
from erniekit.moe.layer import TEXT, VISION
from erniekit.nn.attention_mask import make_plan, next_in_document
from erniekit.nn.neftune import NoiseStep, make_noise

SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3])
IDS = np.arange(10) + 20
NOISE = NoiseStep(5.0, seed=7, step=3)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model()


def test_neftune_adds_noise_of_the_published_size(model: CausalLM):
    plain = model.model.embed(packed_inputs(model, IDS, SEGMENTS)).numpy()
    np.testing.assert_array_equal(plain, model.model.embed_tokens.weight.numpy()[IDS])
    noisy = model.model.embed(packed_inputs(model, IDS, SEGMENTS, noise=NOISE)).numpy()
    lengths = np.array([5, 5, 5, 5, 5, 2, 2, 3, 3, 3])
    bound = 5.0 / np.sqrt(lengths * model.config.hidden_size)
    noise = np.abs(noisy - plain)
    assert (noise <= bound[:, None] + 1e-6).all()
    assert (noise.max(axis=1) > 0.5 * bound).all()


def noise_of(model: CausalLM, ids: np.ndarray, segments: np.ndarray, noise: NoiseStep = NOISE) -> np.ndarray:
    inputs = packed_inputs(model, ids, segments, noise=noise)
    return model.model.embed(inputs).numpy() - model.model.embed_tokens.weight.numpy()[ids]


def test_a_document_has_the_same_noise_wherever_it_is_packed(model: CausalLM):
    whole = noise_of(model, IDS, SEGMENTS)
    for start, stop in ((0, 5), (5, 7), (7, 10)):
        np.testing.assert_array_equal(noise_of(model, IDS[start:stop], np.ones(stop - start)), whole[start:stop])
    for other in (NoiseStep(5.0, seed=8, step=3), NoiseStep(5.0, seed=7, step=4)):
        assert not np.allclose(noise_of(model, IDS, SEGMENTS, other), whole, atol=0.1)


def test_neftune_noise_is_uniform_and_independent():
    """Mean, variance and correlations of 200 x 200 numbers, within five standard errors."""
    plan = make_plan(np.ones((1, 200), np.int64), None)
    noise = make_noise(NOISE, np.arange(200), plan, None, 200)
    unit = noise.rows(0, 200, 200) / noise.bounds[:, None]
    assert np.abs(unit).max() <= 1 and abs(unit.mean()) < 5 / np.sqrt(3 * 40_000)
    np.testing.assert_allclose(np.var(unit), 1 / 3, atol=5 * np.sqrt(4 / 45 / 40_000))
    for table in (unit, unit.T):  # tokens, and features
        correlations = np.corrcoef(table)[np.triu_indices(200, 1)]
        assert np.abs(correlations).max() < 5.5 / np.sqrt(200)


def test_ranks_that_share_tokens_add_their_own_part_of_the_noise():
    """Two ranks of sequence parallelism, each with half of the tokens, have what one alone has."""
    model = tiny_model()
    embedding, inputs = model.model.embed_tokens, packed_inputs(model, IDS, SEGMENTS, noise=NOISE)
    whole = model.model.embed(inputs).numpy()
    for rank in range(2):
        own = slice(5 * rank, 5 * rank + 5)
        embedding.own_span = lambda num_tokens, own=own: (own.start, own.stop)
        embedding.lookup = lambda ids, weight, own=own: paddle.nn.functional.embedding(ids[own], weight)
        np.testing.assert_array_equal(model.model.embed(inputs).numpy(), whole[own])


def test_the_token_ahead_has_no_noise_and_stays_in_its_document(model: CausalLM):
    inputs = packed_inputs(model, IDS, SEGMENTS, noise=NOISE)
    target, valid = next_in_document(inputs.attention.plan.document_of_token, 2)
    assert target.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert valid.tolist() == [True, True, True, False, False, False, False, True, False, False]
    ahead = embed_ahead(model.model.embed_tokens, inputs, 2)
    np.testing.assert_array_equal(ahead.numpy(), model.model.embed_tokens.weight.numpy()[IDS[target]])


def test_one_row_and_rows_of_documents_give_the_same(model: CausalLM):
    """Equal ids in neighbouring rows are different documents."""
    rows = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 2, 2]])
    flat = np.array([1, 1, 2, 2, 2, 3, 3, 3, 4, 4])
    positions = np.array([3, 4, 0, 1, 2, 5, 6, 7, 1, 2])
    for given in (None, positions):
        in_rows = None if given is None else given.reshape(rows.shape)
        one = model.model(packed_inputs(model, IDS, flat, given)).last.numpy()
        other = model.model(packed_inputs(model, IDS.reshape(rows.shape), rows, in_rows)).last.numpy()
        np.testing.assert_array_equal(one, other)


def made_row(length: int) -> PackedBatch:
    ids = np.arange(length)
    return PackedBatch.text_row(ids + 20, ids + 21, ids, ids * 0, ["a:1"])


def test_a_batch_keeps_its_numbers_of_tokens_and_segments(model: CausalLM):
    batch = join_rows([made_row(5), made_row(3)])
    inputs = batch_inputs(model, batch)
    assert inputs.input_ids.numpy().tolist() == batch.input_ids.tolist()
    assert np.array_equal(inputs.attention.plan.document_of_token, batch.segment_ids)
    assert inputs.tokens.row_lengths == [5, 3] and inputs.tokens.modality is None


@pytest.mark.parametrize(("lengths", "padded"), [([5, 3], 8), ([5, 4], 12), ([4], 4), ([], 4)])
def test_padding_is_a_document_behind_the_batch_that_no_router_sees(monkeypatch, lengths: list[int], padded: int):
    model, batch = tiny_model(), join_rows([made_row(length) for length in lengths])
    monkeypatch.setattr(CausalLM, "token_multiple", 4)
    inputs = batch_inputs(model, batch)
    assert padded_length(model, batch) == inputs.attention.plan.num_tokens == padded
    documents = inputs.attention.plan.document_of_token
    assert documents.tolist() == batch.segment_ids.tolist() + [len(lengths)] * (padded - batch.num_tokens)
    assert inputs.input_ids.numpy()[batch.num_tokens :].tolist() == [0] * (padded - batch.num_tokens)
    assert sum(inputs.tokens.row_lengths) == batch.num_tokens


def test_a_batch_without_tokens_has_one_on_the_device(model: CausalLM):
    assert batch_inputs(model, join_rows([])).input_ids.shape == [1]


def test_the_prefix_of_an_answer_is_its_prompt(model: CausalLM):
    layout = PairLayout(2, 3, 2, 1.0)
    document = Document(np.arange(7, dtype=np.int32) + 20, np.arange(7, dtype=np.int32), layout)
    batch = join_rows([made_row(4), make_row([document], ["a:2"])])
    hidden = model.model(batch_inputs(model, batch)).last.numpy()
    alone = [[*range(20, 25)], [20, 21, 25, 26]]
    for ids, tokens in zip(alone, ([4, 5, 6, 7, 8], [4, 5, 9, 10]), strict=True):
        expected = model.model(packed_inputs(model, np.array(ids), np.ones(len(ids)))).last.numpy()
        np.testing.assert_allclose(hidden[tokens], expected, rtol=1e-4, atol=1e-5)


def test_images_and_videos_are_one_modality_to_the_experts():
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    batch = join_rows([made_row(4)])
    batch = dataclasses.replace(batch, modality=np.array([0, 1, 2, 0], np.int8))
    assert batch_inputs(model, batch).tokens.modality.tolist() == [TEXT, VISION, VISION, TEXT]
