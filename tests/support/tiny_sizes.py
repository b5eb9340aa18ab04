"""Values of config.json for small models; support/tiny_models.py makes models of them."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
DENSE = SIZES | {
    "model_type": "ernie4_5",
    "vocab_size": 61,
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
