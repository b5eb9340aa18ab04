"""Which chunk of a stage reaches a parameter."""

import paddle
import pytest
from support.tiny_models import MOE

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.pipeline_layout import parameter_chunks
from erniekit.nn.shard import RankShard

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
    layers = tuple(layer for held in chunks for layer in held)
    config = ModelConfig.from_dict(
        MOE | {"num_hidden_layers": 8, "tie_word_embeddings": "embed" in name and chunks == LAST}
    )
    shard = RankShard(layers=layers, has_embedding=0 in layers, has_head=7 in layers)
    with paddle.LazyGuard():
        model = CausalLM(config, shard)
    assert parameter_chunks(model, chunks)[name] == chunk
