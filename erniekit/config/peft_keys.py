"""PEFT's and PaddleNLP's names of adapter settings, which are accepted only in a block such as `lora_config:`."""

from erniekit.config.compat import Alias, Fixed, every_module

BLOCKS = ("lora_config", "peft_config", "lora_args", "peft_args")


_ALL_LAYERS = "the same modules are adapted in all layers; name single layers by a regular expression in target_modules"
_ONE_RANK = "all adapters have the same rank and scaling; set r and lora_alpha"

_RULES: dict[str, Alias | Fixed] = {
    "r": Alias("lora_rank"),
    "target_modules": Alias("lora_target_modules", every_module),
    "bias": Fixed(("none",), "adapters train no biases; only bias: none"),
    "trainable_bias": Fixed((False,), "adapters train no biases"),
    "lora_bias": Fixed((False,), "adapters have no biases"),
    "rank_pattern": Fixed((), _ONE_RANK),
    "alpha_pattern": Fixed((), _ONE_RANK),
    "enable_lora_list": Fixed((), _ALL_LAYERS),
    "layers_to_transform": Fixed((), _ALL_LAYERS),
    "layers_pattern": Fixed((), _ALL_LAYERS),
    "layer_replication": Fixed((), "layers are not repeated"),
    "exclude_modules": Fixed((), "name in target_modules what is adapted, without these"),
    "trainable_modules": Fixed((), "name in modules_to_save what is trained whole"),
    "trainable_token_indices": Fixed((), "single tokens are not trained; modules_to_save: [embed_tokens] trains all"),
    "target_parameters": Fixed((), "name the modules in target_modules; experts are modules here"),
    "init_lora_weights": Fixed((True,), "A begins at random and B at zero, as PEFT's True means"),
    "pissa": Fixed((False,), "adapters begin at random and zero"),
    "fan_in_fan_out": Fixed((False,), "no weight of ERNIE is stored transposed"),
    "loftq_config": Fixed((), "the base keeps its own values"),
    "peft_type": Fixed(("lora",), "only LoRA and its variants"),
    # Settings that follow from other keys.
    "task_type": Fixed(("causal_lm",), "stage says what is trained; only CAUSAL_LM"),
    "inference_mode": Fixed((False,), "`train` trains adapters; only inference_mode: False"),
}


def rule_of(name: str, block: str) -> Alias | Fixed | None:
    """The rule of a key in this block; None if the block gives it no special meaning."""
    return _RULES.get(name) if block in BLOCKS else None
