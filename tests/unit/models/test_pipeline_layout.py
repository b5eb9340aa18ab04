"""Which chunk of a stage reaches a parameter."""

import pytest

from erniekit.models.pipeline_layout import chunk_of

FIRST, LAST = [(0, 1), (4, 5)], [(2, 3), (6, 7)]  # two stages of two chunks


@pytest.mark.parametrize(
    ("name", "chunks", "chunk"),
    [
        ("model.layers.1.input_layernorm.weight", FIRST, 0),
        ("model.layers.4.mlp.gate.weight", FIRST, 1),
        ("model.embed_tokens.weight", FIRST, 0),
        ("model.embed_tokens.weight", LAST, 1),  # shared with the head
        ("model.norm.weight", LAST, 1),
        ("lm_head.weight", LAST, 1),
        ("model.embed_tokens.weight", [(0, 1, 2)], 0),
    ],
)
def test_a_parameter_belongs_to_the_chunk_whose_backward_pass_reaches_it(name, chunks, chunk):
    assert chunk_of(name, chunks) == chunk
