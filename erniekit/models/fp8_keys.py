"""The keys of FP8 compared with the model's shape, which needs no Paddle and no weights."""

from collections.abc import Iterator

from erniekit.config.schema import Config
from erniekit.models.config import ModelConfig
from erniekit.utils.errors import ConfigError


def check_fp8_keys(cfg: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError if nothing of the model would multiply in FP8, or if a key names a layer that it lacks."""
    if cfg.fp8 == "none":
        return
    parts = _parts(model_config)
    if not parts & set(cfg.fp8_modules):
        raise ConfigError(
            f"fp8_modules: {','.join(cfg.fp8_modules)}: the model has none of these, so that nothing would multiply in "
            f"FP8. It has {', '.join(sorted(parts))}: name some of them, or set fp8: none"
        )
    strange = sorted(n for n in set(cfg.fp8_recompute_up_gate_layers) if n >= model_config.num_hidden_layers)
    if strange:
        last = model_config.num_hidden_layers - 1
        raise ConfigError(f"fp8_recompute_up_gate_layers: {strange}: the model has layers 0 to {last}")


def fp8_notes(cfg: Config, model_config: ModelConfig) -> Iterator[str]:
    """Which part of a key's value has no effect with this model."""
    if cfg.fp8 == "none":
        return
    absent = [part for part in cfg.fp8_modules if part not in _parts(model_config)]
    if absent:
        yield f"fp8_modules: {','.join(absent)}: no effect: the model has none"
    dense = sorted(n for n in set(cfg.fp8_recompute_up_gate_layers) if not model_config.is_moe_layer(n))
    if dense and "experts" in cfg.fp8_modules and model_config.moe_num_experts:
        yield f"fp8_recompute_up_gate_layers: {dense}: no effect: these layers have no routed experts"


def _parts(model_config: ModelConfig) -> set[str]:
    """The choices of fp8_modules that the model has."""
    parts = {"attention"}
    if "dense" in model_config.layer_types:
        parts.add("mlp")
    if "sparse" in model_config.layer_types:
        parts |= {"experts", "shared_experts"} if model_config.moe_num_shared_experts else {"experts"}
    return parts
