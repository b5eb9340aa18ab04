"""Small models with random weights for tests of what is built on top of the decoder."""

import paddle

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM

DENSE = {
    "model_type": "ernie4_5",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    # Large weights: scores of untrained models are otherwise so close that the choice between them is a matter of
    # rounding.
    "initializer_range": 0.3,
}
MOE = DENSE | {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
KINDS = {"dense": DENSE, "moe": MOE}


def tiny_model(kind: str = "dense", seed: int = 3, **changes: object) -> CausalLM:
    """A dense or sparse model of two layers; `changes` are keys of config.json."""
    paddle.seed(seed)
    model = CausalLM(ModelConfig.from_dict(KINDS[kind] | changes))
    model.eval()
    return model
