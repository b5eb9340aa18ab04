"""What the first layer takes, from packed documents."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import embed_ahead, packed_inputs

SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3])
IDS = np.arange(10) + 20


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model()


def test_neftune_adds_noise_of_the_published_size(model: CausalLM):
    plain = model.model.embed(packed_inputs(model, IDS, SEGMENTS)).numpy()
    np.testing.assert_array_equal(plain, model.model.embed_tokens.weight.numpy()[IDS])
    noisy = model.model.embed(packed_inputs(model, IDS, SEGMENTS, neftune_alpha=5.0)).numpy()
    lengths = np.array([5, 5, 5, 5, 5, 2, 2, 3, 3, 3])
    bound = 5.0 / np.sqrt(lengths * model.config.hidden_size)
    noise = np.abs(noisy - plain)
    assert (noise <= bound[:, None] + 1e-6).all()
    assert (noise.max(axis=1) > 0.5 * bound).all()


def test_ranks_that_share_tokens_add_their_own_part_of_the_noise():
    """Two ranks of sequence parallelism, each with half of the tokens, have what one alone has."""
    model = tiny_model()
    embedding, inputs = model.model.embed_tokens, packed_inputs(model, IDS, SEGMENTS, neftune_alpha=5.0)
    paddle.seed(7)
    whole = model.model.embed(inputs).numpy()
    for rank in range(2):
        own = slice(5 * rank, 5 * rank + 5)
        embedding.own_span = lambda num_tokens, own=own: (own.start, own.stop)
        embedding.lookup = lambda ids, weight, own=own: paddle.nn.functional.embedding(ids[own], weight)
        paddle.seed(7)
        np.testing.assert_array_equal(model.model.embed(inputs).numpy(), whole[own])


def test_the_token_ahead_has_no_noise_and_stays_in_its_document(model: CausalLM):
    inputs = packed_inputs(model, IDS, SEGMENTS, neftune_alpha=5.0)
    ahead, target, valid = embed_ahead(model.model.embed_tokens, inputs, 2)
    assert target.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert valid.tolist() == [True, True, True, False, False, False, False, True, False, False]
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
