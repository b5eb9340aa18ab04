"""The values of a config.json, checked one by one; how they must fit together: ModelConfig."""

import functools
from collections.abc import Mapping
from typing import Any

from erniekit.models import config_vision
from erniekit.models.config_keys import ALIASES, OWN_KEYS, QUANTISED, check_keys, refusal
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject

# The class names that each side writes. transformers has no underscore in the dense one; early -PT files have Paddle's.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "pt": {
        "ernie4_5": "Ernie4_5ForCausalLM",
        "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
        "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    },
    "paddle": {
        "ernie4_5": "Ernie4_5_ForCausalLM",
        "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
        "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    },
}
_MODEL_TYPES = {name: model_type for names in ARCHITECTURES.values() for model_type, name in names.items()}

# A reward model has the class name that transformers gives to such models of other families.
CAUSAL, SEQUENCE = "ForCausalLM", "ForSequenceClassification"

# Far above any model, and low enough that a slip of the keyboard is an error message and not a full memory.
_MAX_WIDTH = 1 << 24
_MAX_LAYERS = 4096
_MAX_POSITIONS = 1 << 40
# A wrong guess of one of these would build another model, so they must be in the file.
# `num_key_value_heads: null` means "as many as query heads".
_REQUIRED = {
    "vocab_size": _MAX_WIDTH,
    "hidden_size": _MAX_WIDTH,
    "intermediate_size": _MAX_WIDTH,
    "num_hidden_layers": _MAX_LAYERS,
    "num_attention_heads": 1 << 16,
}
_REQUIRED_MOE = {"moe_num_experts": 1 << 16, "moe_k": 1 << 16, "moe_intermediate_size": _MAX_WIDTH}
# The defaults of transformers' config classes, for keys that a file leaves out or sets to null, with their bounds.
_OPTIONAL_MOE_INT = {
    "moe_num_shared_experts": (2, 0, 1 << 16),
    "moe_layer_start_index": (1, 0, _MAX_LAYERS),
    "moe_layer_end_index": (-1, -1, _MAX_LAYERS),
    "moe_layer_interval": (1, 1, _MAX_LAYERS),
}
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TINY = 1e-38  # positive numbers are at least the smallest that float32 holds
_DEFAULT_ROPE_THETA = 500000.0
_MAX_ROPE_THETA = 1e18
_DENSE_HEAD_DIM = 128
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def read_values(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig from the contents of a config.json, and lines about what is not used.

    CheckpointError names `source` and the key: a value of a wrong kind, or a setting that would make another model.
    """
    config = JsonObject(values, source, CheckpointError)
    model_type, vision = _model_type(config), None
    if model_type == config_vision.MODEL_TYPE:
        if "vision_config" not in config:
            raise CheckpointError(
                f"{source}: model_type: {config.values.get('model_type')!r:.60} is a vision-language model, but "
                f"vision_config is missing. {_COPY}"
            )
        config, vision = config_vision.separate(config)
        source = config.where
    fields: dict[str, Any] = {key: _required(config, key, high) for key, high in _REQUIRED.items()}
    heads = fields["num_attention_heads"]
    if "num_key_value_heads" not in config:
        raise CheckpointError(f"{source}: num_key_value_heads: missing. {_COPY}")
    fields["num_key_value_heads"] = config.get_int("num_key_value_heads", heads, 1, 1 << 16)
    fields["max_position_embeddings"] = config.get_int("max_position_embeddings", 131072, 1, _MAX_POSITIONS)
    fields["num_nextn_predict_layers"] = config.get_int("num_nextn_predict_layers", 0, 0, 64)
    fields["rms_norm_eps"] = float(config.get_number("rms_norm_eps", 1e-5, _TINY, 1))
    fields["initializer_range"] = float(config.get_number("initializer_range", 0.02, _TINY, 1e3))
    fields["use_bias"] = config.get_bool("use_bias", False)
    fields["tie_word_embeddings"] = config.get_bool("tie_word_embeddings", True)
    fields |= {key: _token_id(config, key, default, fields["vocab_size"]) for key, default in _TOKEN_IDS.items()}
    if model_type != "ernie4_5":
        fields |= _moe_fields(config, fields["num_hidden_layers"])
    fields["has_score_head"] = _has_score_head(config)
    lines = check_keys(config, fields)
    if config.values.get("hidden_act") not in (None, "silu"):
        raise refusal(config, "hidden_act", "ERNIE 4.5 models use silu")
    fields["extra"] = {
        key: value
        for key, value in config.values.items()
        if (key not in OWN_KEYS | fields.keys() and key not in QUANTISED and key != "num_labels")
        or (key == "eos_token_id" and isinstance(value, list))
    }
    fields["head_dim"] = _head_dim(config, fields, model_type)
    fields["rope_theta"] = _rope_theta(config)
    fields["dtype"] = _dtype(config)
    return {"model_type": model_type, **fields, "vision": vision}, lines


def token_ids(config: JsonObject, key: str, vocab_size: int) -> tuple[int, ...] | None:
    """The tokens that a key names, one or a list of them; null and -1 are none. None where the key is absent."""
    if key not in config:
        return None
    value = config.values[key]
    found = value if isinstance(value, list) else [value]
    for token in found:
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise CheckpointError(f"{config.where}: {key}: must be a token id, found {token!r:.60}. {_COPY}")
        if token is not None and not -1 <= token < vocab_size:
            raise CheckpointError(
                f"{config.where}: {key}: {token} is not a token: the vocabulary has {vocab_size} (0 to "
                f"{vocab_size - 1}; -1 or null: none). {_COPY}"
            )
    return tuple(token for token in found if token not in (None, -1))


_COPY = "Copy the file again from the model's source."


def _required(config: JsonObject, key: str, high: int) -> int:
    own = next((alias for alias, name in ALIASES.items() if name == key and alias in config), key)
    if own not in config and key not in config:
        raise CheckpointError(f"{config.where}: {key}: missing. {_COPY}")
    if isinstance(config.values.get(key), list) and key.startswith("moe_"):
        raise CheckpointError(
            f"{config.where}: {key}: a list (one number per modality) is a vision-language model's, and model_type "
            f"says that this is a text model. {_COPY}"
        )
    found = {name: config.get_int(name, None, 1, high) for name in {key, own} if name in config}
    numbers = set(found.values())
    if None in numbers:
        raise CheckpointError(f"{config.where}: {key}: must be an integer, found null. {_COPY}")
    if len(numbers) > 1:
        raise CheckpointError(f"{config.where}: {key} {found[key]} and {own} {found[own]} mean the same and differ.")
    return int(numbers.pop() or 0)


def _model_type(config: JsonObject) -> str:
    found = config.get_text("model_type", None)
    architectures = [name for name in config.get_list("architectures", []) if isinstance(name, str)]
    if found is None:  # early Paddle files name the class only
        found = next((_MODEL_TYPES[name] for name in architectures if name in _MODEL_TYPES), None)
    if found is not None and found in _MODEL_TYPES.values():
        return found
    if found == config_vision.MODEL_TYPES["paddle"]:
        return config_vision.MODEL_TYPE
    if found is None:
        raise CheckpointError(
            f"{config.where}: model_type: missing, and architectures {architectures!r:.80} do not tell. Set it to "
            "ernie4_5 (dense), ernie4_5_moe, or ernie4_5_vl_moe (vision-language)."
        )
    raise CheckpointError(
        f"{config.where}: model_type: {found!r:.60} is not supported. Supported: ernie4_5 (dense), ernie4_5_moe, and "
        "ernie4_5_vl_moe or ernie4_5_moe_vl (vision-language)."
    )


def _has_score_head(config: JsonObject) -> bool:
    """Whether the file is of a reward model: one label, and a class for sequences."""
    names = [name for name in config.get_list("architectures", []) if isinstance(name, str)]
    if not any(name.endswith(SEQUENCE) for name in names):
        return False
    labels = config.get_int("num_labels", 1, 0, 1 << 16)
    if labels != 1:
        raise refusal(config, "num_labels", f"a {names[0]:.60} is read as a reward model, which has one")
    return True


def _moe_fields(config: JsonObject, num_hidden_layers: int) -> dict[str, Any]:
    """The fields that only a mixture of experts has."""
    fields: dict[str, Any] = {key: _required(config, key, high) for key, high in _REQUIRED_MOE.items()}
    fields |= {key: config.get_int(key, *bounds) for key, bounds in _OPTIONAL_MOE_INT.items()}
    fields["moe_norm_min"] = float(config.get_number("moe_norm_min", 1e-12, _TINY, 1))
    fields["moe_gate_act"] = config.get_choice("moe_gate_act", "softmax", ("softmax", "sigmoid"))
    fields["moe_group_experts"] = config.get_bool("moe_group_experts", False)
    if fields["moe_layer_end_index"] == -1:
        fields["moe_layer_end_index"] = num_hidden_layers - 1
    return fields


def _token_id(config: JsonObject, key: str, default: int, vocab_size: int) -> int | None:
    """The first of several end tokens; the list itself stays in `extra` and is written back."""
    if isinstance(config.values.get(key), list) and key != "eos_token_id":
        raise CheckpointError(f"{config.where}: {key}: must be a token id, found a list. {_COPY}")
    found = token_ids(config, key, vocab_size)
    if found is None:
        return default
    return found[0] if found else config.values[key] if config.values[key] == -1 else None


def _head_dim(config: JsonObject, fields: Mapping[str, Any], model_type: str) -> int:
    """Absent: 128 in a dense model and hidden / heads in a MoE model; null: hidden / heads (transformers)."""
    if "head_dim" not in config and model_type == "ernie4_5":
        return _DENSE_HEAD_DIM
    return config.get_int("head_dim", fields["hidden_size"] // fields["num_attention_heads"], 1, 1 << 16)


def _rope_theta(config: JsonObject) -> float:
    """The base of the rotary frequencies. As in transformers 5, `rope_scaling`, the older name, stands for
    `rope_parameters` where both are there, and a base inside of it counts more than the one at the top level.
    """
    for key in ("rope_scaling", "rope_parameters"):
        inner = config.get_object(key)
        for name, value in inner.values.items():
            plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}.get(name)
            if name != "rope_theta" and value is not None and value != plain:
                raise refusal(
                    config,
                    key,
                    f"{name} {value!r:.40}: rotary positions without scaling (rope_type default) are supported",
                )
    own = config.get_number("rope_theta", _DEFAULT_ROPE_THETA, 1, _MAX_ROPE_THETA)
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    theta = float(config.get_object(key).get_number("rope_theta", own, 1, _MAX_ROPE_THETA))
    if theta != own and "rope_theta" in config:
        _warn_once(f"{config.where}: rope_theta: {own:g} at the top level, {theta:g} in {key}: the latter counts")
    return theta


@functools.cache
def _warn_once(message: str) -> None:
    """A configuration is read several times in a run."""
    log.warning(message)


def _dtype(config: JsonObject) -> str | None:
    """The dtype of the weights in the file; if both keys are given, the newer name decides, as in transformers."""
    found = None
    for key in ("torch_dtype", "dtype"):
        name = config.get_text(key, None)
        if name is not None and name.removeprefix("torch.") not in _DTYPES:
            raise refusal(config, key, f"weights are one of {', '.join(_DTYPES[:-1])}")
        found = name or found
    return None if found in (None, "auto") else found.removeprefix("torch.")
