"""Parameters that a run leaves as they are: freeze_config and frozen_parameters.

A frozen parameter asks for no gradient, so it is not among the parameters that are synchronised, clipped, decayed and
updated, and the correction bias of a frozen router does not move (moe/expert_bias.py).
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import paddle

from erniekit import lora
from erniekit.build import lora_options
from erniekit.checkpoint.peft_read import StoredAdapter
from erniekit.config.schema import Config
from erniekit.config.schema_parts import FREEZE_LM, FREEZE_VISION
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import our_shapes
from erniekit.nn.roles import Component, named_components
from erniekit.nn.shard import WHOLE
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of

# The words of freeze_config. As in ERNIE's training code, freeze_vision leaves the resampler and the vision experts
# trainable, and freeze_lm the vision experts, too.
_CONFIG = {FREEZE_VISION: Component.VISION_TRANSFORMER, FREEZE_LM: Component.LANGUAGE}
_WORDS = {component.name.lower(): component for component in Component}


def frozen_names(cfg: Config, components: Mapping[str, Component]) -> set[str]:
    """The parameters that are not trained, of those that `components` names with the part that each belongs to.

    ConfigError for an entry that means none of them.
    """
    found: set[str] = set()
    for key, entry in _entries(cfg):
        hits = {name for name, component in components.items() if _means(key, entry, name, component)}
        if not hits:
            parts = ", ".join(word for word, component in _WORDS.items() if component in components.values())
            raise ConfigError(
                f"{key}: {entry} means no parameter of this model, whose parts are {parts}. Use one of these, or a "
                "regular expression for whole names of parameters."
            )
        found |= hits
    return found


def _entries(cfg: Config) -> Iterator[tuple[str, str]]:
    """(key, entry) of all that is to be frozen."""
    for entry in cfg.freeze_config:
        yield "freeze_config", entry
    for entry in cfg.frozen_parameters:
        yield "frozen_parameters", entry


def _means(key: str, entry: str, name: str, component: Component) -> bool:
    """Whether an entry means a parameter of this name and component."""
    if key == "freeze_config":
        return _CONFIG[entry] is component
    return _WORDS[entry] is component if entry in _WORDS else re.fullmatch(entry, name) is not None


def check_frozen(cfg: Config, config: ModelConfig, adapter: StoredAdapter | None = None) -> set[str]:
    """The frozen parameters of a model of this configuration, which is made without its weights. ConfigError where an
    entry names none of them, or nothing is left to train. `adapter`: the saved one whose training continues.
    """
    if not cfg.freeze_config and not cfg.frozen_parameters:
        return set()
    with paddle.LazyGuard():
        components = named_components(CausalLM(config))
    frozen = frozen_names(cfg, components)
    if len(frozen) == len(components):
        raise ConfigError("freeze_config, frozen_parameters: every parameter is frozen, so nothing is left to train.")
    if cfg.fine_tuning == "LoRA" and not _trains_adapters(cfg, config, components, adapter):
        cure = "." if adapter else ", or name projections of other parts in lora_target_modules."
        raise ConfigError(
            "freeze_config, frozen_parameters: every adapter belongs to a frozen part, so nothing is left to train. "
            f"Freeze less{cure}"
        )
    return frozen


def _trains_adapters(
    cfg: Config, config: ModelConfig, components: Mapping[str, Component], adapter: StoredAdapter | None
) -> bool:
    """Whether an adapter, or a module of modules_to_save, belongs to a part that is not frozen."""
    if adapter is None:
        options = lora_options(cfg)
        slots, saved = lora.choose_slots(our_shapes(config), options, config.tie_word_embeddings)
    else:
        options, slots, saved = adapter.options, adapter.slots, adapter.saved
    trained = {name: components[name] for name in saved}
    for module, parts in slots.items():
        names = lora.parameter_names(module, parts, options.dora)
        trained |= dict.fromkeys(names, components[f"{module}.weight"])
    return any(
        not any(_means(key, entry, name, component) for key, entry in _entries(cfg))
        for name, component in trained.items()
    )


def freeze(model: CausalLM, cfg: Config) -> None:
    """Freeze what the configuration names of the parameters that this process holds, and say what is left."""
    if not cfg.freeze_config and not cfg.frozen_parameters:
        return
    components, parameters = named_components(model), dict(model.named_parameters())
    frozen = {
        name
        for name, component in components.items()
        if any(_means(key, entry, name, component) for key, entry in _entries(cfg))
    }
    for name in frozen:
        parameters[name].stop_gradient = True
    trained = [parameter for parameter in parameters.values() if not parameter.stop_gradient]
    here = "" if model.shard == WHOLE else " on this rank"
    log.info(
        f"frozen: {_size(parameters[name] for name in frozen):,} parameters in "
        f"{count_of(len(frozen), 'tensor')}{here}; {_size(trained):,} are trained"
    )


def freeze_untrained_mtp(model: CausalLM, cfg: Config) -> None:
    """Freeze the model's blocks of multi-token prediction that the run does not train."""
    trained, decoder = cfg.mtp_depths, model.model
    frozen = model.config.num_nextn_predict_layers - trained
    if frozen <= 0:
        return
    log.info(
        f"num_nextn_predict_layers: {trained}: {frozen} of the model's multi-token-prediction blocks are kept, not "
        "trained"
    )
    for depth in range(trained, len(decoder.mtp_block)):
        for parameter in (p for layer in decoder.mtp_layers(depth) for p in layer.parameters()):
            parameter.stop_gradient = True


def _size(parameters: Iterable[paddle.Tensor]) -> int:
    return sum(int(np.prod(parameter.shape)) for parameter in parameters)
