"""Determines the shape of the model that a run trains: from config.json, from the YAML, or from config.json with
changes from the YAML.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erniekit.checkpoint.vision_start import VisionStart, config_directory, joined_config
from erniekit.config.schema import Config
from erniekit.config.schema_shape import NEEDED_OF_EXPERTS
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.hub import resolve_model, resolve_tokenizer
from erniekit.models.config import ModelConfig
from erniekit.utils.errors import ConfigError

_HINT = "Change these keys in the YAML"


def directories(cfg: Config) -> tuple[Path, Path]:
    """The directories of the model's files and of the tokenizer's; Hub names are downloaded. They are the same if the
    YAML gives the model's shape.
    """
    model = None
    if cfg.model_name_or_path:
        model = resolve_model(cfg.model_name_or_path, cfg.download_hub, weights=cfg.continue_training)
    if not cfg.tokenizer_name_or_path:
        assert model is not None, "config.load requires a model or a tokenizer to train"
        return model, model
    tokenizer = resolve_tokenizer(cfg.tokenizer_name_or_path, cfg.download_hub)
    return model or tokenizer, tokenizer


def given_shape(cfg: Config) -> dict[str, Any]:
    """The keys of the model's shape that the YAML sets."""
    values = {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "use_bias": cfg.use_bias,
        "initializer_range": cfg.initializer_range,
        "moe_num_experts": cfg.moe_num_experts,
        "moe_k": cfg.moe_k,
        "moe_intermediate_size": cfg.moe_intermediate_size,
        "moe_num_shared_experts": cfg.moe_num_shared_experts,
        "moe_layer_start_index": cfg.moe_layer_start_index,
        "moe_layer_end_index": cfg.moe_layer_end_index,
        "moe_layer_interval": cfg.moe_layer_interval,
    }
    return {key: value for key, value in values.items() if value is not None}


def vision_start(cfg: Config, shape: ModelConfig) -> VisionStart | None:
    """How vision is added to the text model that the configuration names; None where it is not. `shape`: see
    `model_config`.
    """
    if not cfg.vision_config_path or not cfg.method.vision:
        return None
    return VisionStart(shape, cfg.vision_experts_from_text, cfg.vision_experts_down_scale)


def adds_vision(cfg: Config, stored: ModelConfig) -> bool:
    """Whether a training with this configuration makes a vision-language model of one with the config.json `stored`."""
    return bool(cfg.vision_config_path) and cfg.method.vision and stored.vision is None


def processor_directory(cfg: Config, model_dir: Path) -> Path:
    """The directory of the files that say how pictures are prepared."""
    return config_directory(cfg.vision_config_path) if cfg.vision_config_path else model_dir


def model_config(cfg: Config, directory: Path) -> ModelConfig:
    """The model's configuration, before anything is built or a weight is read. `directory`: the model's, or the
    tokenizer's where there is no model.

    A ConfigError names the keys of a shape that is incomplete, contradicts itself, or differs from that of the weights.
    """
    given = given_shape(cfg)
    if not cfg.model_name_or_path:
        return _from_yaml(cfg, given, directory)
    stored = ModelConfig.from_dir(directory)
    if cfg.vision_config_path and cfg.method.vision:
        _require_same(given, stored, directory)
        return joined_config(stored, directory, cfg.vision_config_path)
    if given and stored.vision is not None:
        raise ConfigError(
            f"{', '.join(given)}: the shape of a vision-language model cannot be given here. Change config.json in "
            f"{directory}."
        )
    if cfg.continue_training:
        _require_same(given, stored, directory)
        return stored
    return _changed(stored, given, directory) if given else stored


def require_pictures(cfg: Config, config: ModelConfig, directory: Path) -> None:
    """ConfigError where the method has data with pictures and the model cannot see them."""
    if cfg.method.vision and config.vision is None:
        raise ConfigError(
            f"stage: {cfg.method.name}: {directory} is a model of text alone ({config.model_type}), which has no use "
            "for pictures. Name a vision-language model, or choose a stage for text."
        )


def _require_same(given: Mapping[str, Any], stored: ModelConfig, directory: Path) -> None:
    last = {"moe_layer_end_index": stored.num_hidden_layers - 1}
    wrong = [
        f"{key}: {value} (there {vars(stored)[key]})"
        for key, value in given.items()
        if (last.get(key, value) if value == -1 else value) != vars(stored)[key]
    ]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: not the shape of the weights in {directory}. Leave these keys out, or set "
            "continue_training: false for a random start in the shape that they give."
        )


def _changed(stored: ModelConfig, given: Mapping[str, Any], directory: Path) -> ModelConfig:
    """config.json with the values of the YAML's keys."""
    values = stored.to_dict("pt")
    if stored.moe_layer_end_index == stored.num_hidden_layers - 1:
        values["moe_layer_end_index"] = -1  # the last layer, whatever the number of layers
    values |= given
    _set_kind(values)
    return ModelConfig.from_dict(values, source=f"{directory}/config.json with the YAML's keys", hint=_HINT)


def _from_yaml(cfg: Config, given: Mapping[str, Any], tokenizer_dir: Path) -> ModelConfig:
    """A shape from the YAML alone; its special tokens are those of the tokenizer."""
    tokenizer = load_tokenizer(tokenizer_dir)
    heads = given["num_attention_heads"]
    if given["vocab_size"] < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size: {given['vocab_size']}: the tokenizer in {tokenizer_dir} has {tokenizer.vocab_size} token "
            "ids. Give at least that many."
        )
    values = {
        "num_key_value_heads": heads,
        "head_dim": given["hidden_size"] // heads,
        "moe_num_experts": 0,
        "moe_num_shared_experts": 0,
        "max_position_embeddings": cfg.max_seq_len,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    } | dict(given)
    _set_kind(values)
    return ModelConfig.from_dict(values, source=cfg.source or "the configuration", hint=_HINT)


def _set_kind(values: dict[str, Any]) -> None:
    """Set the model type, dense or sparse, from moe_num_experts."""
    if values.get("moe_num_experts"):
        values["model_type"] = "ernie4_5_moe"
        missing = [key for key in NEEDED_OF_EXPERTS if key not in values]
        if missing:
            raise ConfigError(
                f"moe_num_experts: {values['moe_num_experts']}: a model with experts also needs {', '.join(missing)}"
            )
    else:
        values["model_type"] = "ernie4_5"
        for key in [key for key in values if key.startswith("moe_")]:
            del values[key]
    values.pop("architectures", None)
