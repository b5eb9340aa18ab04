"""Every key of a config.json that this toolkit knows, by what its value does: see `check_keys`."""

from collections.abc import Callable, Mapping
from typing import Any

from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, kind

# Keys that steer Paddle's own kernels and losses; a -PT config does not carry them.
PADDLE_ONLY = frozenset(
    (
        "add_tail_layers",
        "compression_ratio",
        "fuse_attention_ffn",
        "fuse_attention_qkv",
        "fuse_gate_detach_matmul",
        "fuse_linear",
        "fuse_ln",
        "fuse_rms_norm",
        "fuse_rope",
        "fuse_swiglu",
        "global_aux_loss",
        "max_sequence_length",
        "model_name",
        "moe_aux_loss_lambda",
        "moe_group_orthogonal_loss",
        "moe_orthogonal_loss_lambda",
        "moe_z_loss_lambda",
        "paddleformers_version",
        "paddlenlp_version",
        "use_fast_ln",
        "use_flash_attention",
        "use_rmsnorm",
    )
)
# `auto_map` names Python files (remote code) that no converted directory holds.
PT_ONLY = frozenset(("transformers_version", "_attn_implementation", "attn_implementation", "auto_map"))
# transformers takes these for other names of two sizes (its attribute_map).
ALIASES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
# Read and checked, and written by ModelConfig.to_dict in the target's spelling.
OWN_KEYS = frozenset(
    (
        "architectures",
        "model_type",
        "hidden_act",
        "head_dim",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "torch_dtype",
        "dtype",
        *ALIASES,
    )
)
_OFF = (False, 0, 0.0)

# With another value than these (or null), the checkpoint's own code would compute something else than this model does.
_CHANGES_THE_MODEL: Mapping[str, tuple[Any, ...]] = {
    # biases and norms
    "add_qkv_bias": _OFF,
    "attention_bias": _OFF,
    "lm_head_bias": _OFF,
    "mlp_bias": _OFF,
    "qkv_bias": _OFF,
    "use_qkv_bias": _OFF,
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "normalization": ("rmsnorm", "rms_norm", "RMSNorm"),
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "use_qk_layernorm": _OFF,
    "use_qk_norm": _OFF,
    "use_rmsnorm": (True, 1),
    # activations
    "activation_function": ("silu", "swish", "swiglu"),
    "hidden_activation": ("silu", "swish", "swiglu"),
    # which tokens see which
    "add_cross_attention": _OFF,
    "attention_chunk_size": (),
    "attention_window_size": (),
    "is_causal": (True, 1),
    "is_encoder_decoder": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_sliding_window": _OFF,
    # positions
    "alibi": _OFF,
    "compression_ratio": (1,),
    "mrope_section": ([],),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("rope", "rotary"),
    "rope_3d": _OFF,
    "rope_interleave": (True, 1),
    "rope_interleaved": (True, 1),
    "rotary_dim": (),
    "rotary_pct": (1,),
    "use_alibi": _OFF,
    # factors on scores and hidden states
    "attention_multiplier": (),
    "attn_logit_softcapping": _OFF,
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "final_logit_softcapping": _OFF,
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "scale_qk_coeff": (1,),
    # layers
    "num_kv_shared_layers": _OFF,
    "parallel_attn": _OFF,
    "per_layer_config": ({}, []),
    "pruned_heads": ({}, []),
    "remove_tail_layer": _OFF,
    "use_parallel_residual": _OFF,
    "vision_config": (),
    # routing
    "moe_every2": _OFF,
    "moe_gate": ("topk", "top2", "top2_fused"),
    "moe_norm_gate_logits": (True, 1),
    "moe_num_attn_experts": _OFF,
    "moe_routed_scaling_factor": (1,),
    "moe_use_hard_gate": _OFF,
    "moe_use_token_type_bias": _OFF,
    "n_group": (1,),
    "norm_topk_prob": (True, 1),
    "routed_scaling_factor": (1,),
    "router_jitter_noise": _OFF,
    "scoring_func": ("softmax",),
    "topk_group": (1,),
    "use_shared_expert_gate": _OFF,
}
# Keys of quantised weights: checkpoint/quantised_read.py follows them, and the model is the same.
QUANTISED = (
    *("quantization_config", "quantization", "quant_method", "compression_config", "weight_quantize_algo"),
    "is_quantized",
)

# These act while training only; the run's own keys decide there. A value that does nothing needs no line.
_NOT_USED: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": _OFF,
    "attention_probs_dropout_prob": _OFF,
    "attn_pdrop": _OFF,
    "embd_pdrop": _OFF,
    "hidden_dropout": _OFF,
    "hidden_dropout_prob": _OFF,
    "moe_all_to_all_dropout": _OFF,
    "moe_dropout_prob": _OFF,
    "output_router_logits": _OFF,  # transformers: add the balance loss
    "resid_pdrop": _OFF,
}

# Whatever their value, neither logits nor training here depend on them: notes of other software, its kernels and its
# division of work, names of files and classes, and weights of training losses, which the YAML gives.
_HARMLESS = frozenset(
    (
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "experts_implementation",
        "finetuning_task",
        "global_aux_loss",
        "gradient_checkpointing",
        "id2label",
        "ignored_index",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_window_layers",
        "mask_token_id",
        "name_or_path",
        "num_acc_steps",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "cls_token_id",
        "skip_recompute_ops",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torchscript",
        "unk_token_id",
        "use_bfloat16",
        "use_cache",
        "use_sparse_head_and_loss_fn",
        "weight_share_add_bias",
        *(key for key in PADDLE_ONLY if key not in _CHANGES_THE_MODEL),
        *PT_ONLY,
    )
)
_HARMLESS_BEGINNINGS = (
    "context_parallel",
    "fuse_",
    "moe_group_",  # of processes; moe_group_experts is a field
    "moe_layer_feed",
    "moe_logging",
    "moe_multimodal_",
    "paddle",
    "pipeline_parallel",
    "recompute",
    "sequence_parallel",
    "tensor_model_parallel",
    "tensor_parallel",
    "unsloth",
    "use_flash",
    "use_fused",
    "use_recompute",
    "virtual_pp",
)

# Of a vision_config: how Baidu's code divides and computes it again.
_HARMLESS_IN_VISION = frozenset(("attn_sep", "vit_first_fwd_bsz", "vit_num_recompute_layers"))


def check_keys(config: JsonObject, fields: Mapping[str, Any]) -> list[str]:
    """Refuse what would make another model than the one that is built, and return lines about what is not used.

    `fields`: what was read of the keys that are honoured. Every other key is one of: known to change the model (refused
    unless its value does nothing), known to act in training only (named), known to be harmless, or unknown (named).
    """
    is_dense = "moe_num_experts" not in fields
    if is_dense and any(config.values.get(key) for key in ("moe_num_experts", "num_experts")):
        raise CheckpointError(f"{config.where}: model_type: must be ernie4_5_moe for a model with experts.")
    lines = []
    for key, value in config.values.items():
        without_effect = value is None or (is_dense and key.startswith("moe_"))
        if not without_effect and key not in fields and key not in OWN_KEYS and key not in QUANTISED:
            lines += _check_key(config, key, value, fields)
    return lines


def check_vision_keys(vision: JsonObject, others: Mapping[str, Any]) -> list[str]:
    """Check the keys of a vision_config that are not read, as `check_keys` does; returns lines for the log."""
    lines = []
    for key, value in others.items():
        if value is not None and key not in OWN_KEYS and key not in _HARMLESS_IN_VISION:
            lines += _check_plain(vision, key, value)
    return lines


def _check_key(config: JsonObject, key: str, value: Any, fields: Mapping[str, Any]) -> list[str]:
    """See check_keys: of one key."""
    return _WITH_OTHER_KEYS[key](config, key, fields) if key in _WITH_OTHER_KEYS else _check_plain(config, key, value)


def _check_plain(config: JsonObject, key: str, value: Any) -> list[str]:
    """See check_keys: of one key whose meaning does not depend on others."""
    if key in _CHANGES_THE_MODEL:
        if value not in _CHANGES_THE_MODEL[key]:
            raise refusal(config, key, "ERNIE 4.5 models as transformers defines them do not have it")
        return []
    if key in _NOT_USED:
        line = f"{key}: {_shown(value)} is not used: the keys of the run decide how it trains"
        return [] if value in _NOT_USED[key] else [line]
    if key in _HARMLESS or key.startswith(_HARMLESS_BEGINNINGS):
        return []
    return [f"{key}: {_shown(value)} is not known here and not used; it is kept in what is saved"]


def refusal(config: JsonObject, key: str, reason: str) -> CheckpointError:
    """The error for a key whose value this model cannot follow."""
    value = _shown(config.values[key])
    return CheckpointError(f"{config.where}: {key}: {value} is not supported: {reason}. Use another checkpoint.")


def _window(config: JsonObject, key: str, fields: Mapping[str, Any]) -> list[str]:
    if config.values.get("use_sliding_window") is not False:
        raise refusal(config, key, "every token sees all tokens before it")
    return []


def _layer_types(config: JsonObject, key: str, fields: Mapping[str, Any]) -> list[str]:
    """Both lists have one word a layer."""
    layers, types = fields["num_hidden_layers"], config.get_list(key, [])
    wanted = ["full_attention"] * layers
    if key == "mlp_layer_types":
        first, last = fields.get("moe_layer_start_index", layers), fields.get("moe_layer_end_index", layers)
        every = fields.get("moe_layer_interval", 1)
        wanted = ["sparse" if first <= i <= last and (i + 1) % every == 0 else "dense" for i in range(layers)]
    if types != wanted:
        raise refusal(config, key, f"this model has {_runs(wanted)}")
    return []


def _aux_free(config: JsonObject, key: str, fields: Mapping[str, Any]) -> list[str]:
    config.get_bool(key, False)  # models.pipeline_layout and training.build read it
    return []


def _runs(types: list[str]) -> str:
    """["dense", "sparse", "sparse"] -> "1 x dense, 2 x sparse"."""
    return ", ".join(f"{types.count(name)} x {name}" for name in dict.fromkeys(types))


def _capacity(config: JsonObject, key: str, fields: Mapping[str, Any]) -> list[str]:
    factors = config.values[key]
    numbers = factors if isinstance(factors, list) else [factors]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise CheckpointError(f"{config.where}: moe_capacity: must be a list of numbers, found {_shown(factors)}.")
    # From as many shares as there are experts on, one expert can take every token.
    if all(number >= fields.get("moe_num_experts", 0) for number in numbers):
        return []
    return [f"moe_capacity: {_shown(factors)} is not used: no token is dropped unless the run sets moe_capacity_factor"]


_WITH_OTHER_KEYS: Mapping[str, Callable[[JsonObject, str, Mapping[str, Any]], list[str]]] = {
    "sliding_window": _window,
    "layer_types": _layer_types,
    "mlp_layer_types": _layer_types,
    "moe_use_aux_free": _aux_free,
    "moe_capacity": _capacity,
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else kind(value)
