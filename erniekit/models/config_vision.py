"""The config.json of a vision-language model, in transformers' spelling (`ernie4_5_vl_moe`: text_config and
vision_config beside each other) or Baidu's (`ernie4_5_moe_vl`: the text's keys at the top, lists with one number a
modality).

Either is separated into the keys of a text model, which are then read like any other's, and a VisionConfig.
"""

from collections.abc import Mapping
from typing import Any

from erniekit.models.config_keys import check_vision_keys, refusal
from erniekit.models.vision_config import VisionConfig
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject

MODEL_TYPE = "ernie4_5_vl_moe"
MODEL_TYPES = {"pt": MODEL_TYPE, "paddle": "ernie4_5_moe_vl"}
_TOKENS = (
    "image_token_id",
    "video_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
)
_DEFAULTS = VisionConfig()
_MAX = 1 << 20
_MAX_LAYERS = 4096  # a list with a word for each must fit into memory
# Baidu's keys of the top level that belong to vision: read and written here. Only these values are what the published
# models compute.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_3d": (True,),
    "use_temporal_conv": (True,),
    "moe_use_hard_gate": (True,),
    "moe_use_token_type_bias": (False,),
    "moe_num_attn_experts": (False, 0),
    "mm_vocab_size": (0,),
}
_BAIDU_KEYS = frozenset(
    (*_FIXED, *_TOKENS, "vision_config", "im_patch_id", "freq_allocation", "pixel_hidden_size", "spatial_conv_size")
) | {"temporal_conv_size", "mrope_section"}
_OF_MODALITIES = ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index")
_ONE_OF_ALL = "both modalities have the same number here"
_PIXELS = "patches of three colour channels"


def separate(config: JsonObject) -> tuple[JsonObject, VisionConfig]:
    """The keys of the text model, under the names of a mixture of experts, and the vision part. CheckpointError names
    the key that no such model has.
    """
    return _from_transformers(config) if "text_config" in config else _from_baidu(config)


def join(text: Mapping[str, Any], vision: VisionConfig, layer_types: list[str], format: str) -> dict[str, Any]:
    """The contents of a config.json of `format` from the keys of the text model and the vision part. `layer_types`:
    "dense" or "sparse" by layer.
    """
    if format == "pt":
        return _to_transformers(dict(text), vision, layer_types)
    return _to_baidu(dict(text), vision)


def _from_transformers(config: JsonObject) -> tuple[JsonObject, VisionConfig]:
    text, vision = config.get_object("text_config"), config.get_object("vision_config")
    values = {key: value for key, value in text.values.items() if key not in ("model_type", "mlp_layer_types")}
    for key in ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config"):
        if key in config:
            values[key] = config.values[key]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values.setdefault(key, config.values.get(key))
    _add_outer(config, text, values)
    text_rope = text.get_object("rope_parameters")
    sections = text_rope.get_list("mrope_section", [22, 22, 20])
    values["rope_parameters"] = {key: value for key, value in text_rope.values.items() if key != "mrope_section"}
    layers = text.get_int("num_hidden_layers", 0, 0, _MAX_LAYERS)
    pattern = text.get_list("mlp_layer_types", ["dense"] + ["sparse"] * (layers - 1))
    values |= _layer_range(text, pattern, layers)
    values["moe_intermediate_size"], width = _two(text, "moe_intermediate_size")
    if len(sections) != 3 or sections[0] != sections[1] or not all(isinstance(n, int) and n > 0 for n in sections):
        raise _wrong(text, "rope_parameters", f"mrope_section {sections!r:.60}: expected [n, n, m], positive integers")
    tokens = {key: config.get_int(key, vars(_DEFAULTS)[key], 0, _MAX) for key in _TOKENS}
    rope = vision.get_object("rope_parameters")
    if rope.get_text("rope_type", "axial") != "axial":
        raise refusal(vision, "rope_parameters", "the vision transformer rotates by row and column (rope_type axial)")
    fields: dict[str, Any] = {
        "hidden_size": vision.get_int("hidden_size", _DEFAULTS.hidden_size, 1, _MAX),
        "intermediate_size": vision.get_int("intermediate_size", _DEFAULTS.intermediate_size, 1, _MAX),
        "temporal_merge_size": vision.get_int("temporal_merge_size", 2, 1, 64),
        "rope_theta": float(rope.get_number("rope_theta", _DEFAULTS.rope_theta, 1, 1e18)),
        "expert_size": width,
        "time_frequencies": sections[2],
        "extra": _rest(vision, ("intermediate_size", "temporal_merge_size", "rope_parameters")),
        **tokens,
    }
    return JsonObject(values, text.where, CheckpointError), VisionConfig(**_common(vision), **fields)


def _add_outer(config: JsonObject, text: JsonObject, values: dict[str, Any]) -> None:
    """Add the keys beside text_config and vision_config that this package does not know there, to be judged with those
    of the text model. What text_config has counts.
    """
    known = {*_TOKENS, "text_config", "vision_config", "model_type", "architectures", "transformers_version"}
    for key in config.values.keys() - known:
        value = config.values[key]
        if key in text and value not in (None, values.get(key)):
            log.once(f"{config.where}: {key}: {value!r:.60} is not used: text_config has {values.get(key)!r:.60}")
        values.setdefault(key, value)


def _from_baidu(config: JsonObject) -> tuple[JsonObject, VisionConfig]:
    for key, usual in _FIXED.items():
        if config.values.get(key) is not None and config.values[key] not in usual:
            raise refusal(config, key, "no published ERNIE 4.5 model has it")
    vision = config.get_object("vision_config")
    values = {key: value for key, value in config.values.items() if key not in _BAIDU_KEYS}
    layers = config.get_int("num_hidden_layers", 0)
    values["moe_intermediate_size"], width = _two(config, "moe_intermediate_size")
    values["moe_num_experts"] = _same(config, "moe_num_experts")
    if "moe_layer_start_index" in config:
        values["moe_layer_start_index"] = _same(config, "moe_layer_start_index")
    if "moe_layer_end_index" in config:  # the published files count layers that were cut off
        values["moe_layer_end_index"] = _same(config, "moe_layer_end_index", layers - 1)
    if isinstance(config.values.get("moe_layer_interval"), list):
        values["moe_layer_interval"] = _same(config, "moe_layer_interval")
    rope = config.get_object("rope_scaling")
    if rope.values.get("rope_type") == "ernie_3d":
        values.pop("rope_scaling")
    time = rope.get_int("freq_allocation", _DEFAULTS.time_frequencies, 1, _MAX)
    time = config.get_int("freq_allocation", time, 1, _MAX)
    size = vision.get_int("embed_dim", vision.get_int("hidden_size", _DEFAULTS.hidden_size, 1, _MAX), 1, _MAX)
    if config.get_int("pixel_hidden_size", size) != size:
        raise refusal(config, "pixel_hidden_size", f"the vision transformer gives {size} features a patch")
    merge = vision.get_int("spatial_merge_size", 2, 1, 64)
    if config.get_int("spatial_conv_size", merge) != merge:
        raise refusal(config, "spatial_conv_size", f"spatial_merge_size of vision_config is {merge}")
    fields: dict[str, Any] = _baidu_tokens(config) | {
        "hidden_size": size,
        "intermediate_size": round(size * vision.get_number("mlp_ratio", 4, 0.01, 1000)),
        "temporal_merge_size": config.get_int("temporal_conv_size", 2, 1, 64),
        "expert_size": width,
        "time_frequencies": time,
        "extra": _rest(vision, ("embed_dim", "mlp_ratio", "in_chans", "spatial_patch_size")),
    }
    for alias, key in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
        if vision.get_int(alias, None) not in (None, vision.get_int(key, vars(_DEFAULTS)[key])):
            raise refusal(vision, alias, f"{key} differs")
    return JsonObject(values, config.where, CheckpointError), VisionConfig(**_common(vision), **fields)


def _baidu_tokens(config: JsonObject) -> dict[str, int]:
    """The ids of the tokens that make up pictures. Baidu's own processing uses the image's placeholder for videos, too,
    and its files do not name the others.
    """
    tokens = {key: config.get_int(key, vars(_DEFAULTS)[key], 0, _MAX) for key in _TOKENS}
    tokens["image_token_id"] = config.get_int("im_patch_id", tokens["image_token_id"], 0, _MAX)
    if tokens["video_token_id"] >= config.get_int("vocab_size", _MAX):
        tokens["video_token_id"] = tokens["image_token_id"]
    return tokens


def _common(vision: JsonObject) -> dict[str, Any]:
    """What both spellings have under the same names."""
    if vision.get_text("hidden_act", "quick_gelu") != "quick_gelu":
        raise refusal(vision, "hidden_act", "the vision transformer of ERNIE 4.5 uses quick_gelu")
    return {
        "depth": vision.get_int("depth", _DEFAULTS.depth, 1, _MAX_LAYERS),
        "num_heads": vision.get_int("num_heads", _DEFAULTS.num_heads, 1, 1 << 16),
        "in_channels": vision.get_int("in_channels", _DEFAULTS.in_channels, 1, 1024),
        "patch_size": vision.get_int("patch_size", _DEFAULTS.patch_size, 1, 1024),
        "spatial_merge_size": vision.get_int("spatial_merge_size", 2, 1, 64),
        "layer_norm_eps": float(vision.get_number("rms_norm_eps", _DEFAULTS.layer_norm_eps, 1e-38, 1)),
    }


def _rest(vision: JsonObject, read: tuple[str, ...]) -> dict[str, Any]:
    """The keys of vision_config that are kept as they are."""
    known = {"model_type", "depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size"}
    known |= {"spatial_merge_size", "rms_norm_eps", "initializer_range", *read}
    others = {key: value for key, value in vision.values.items() if key not in known}
    for line in check_vision_keys(vision, others):
        log.once(f"{vision.where}: {line}")
    return others


def _two(config: JsonObject, key: str) -> tuple[int, int]:
    """The numbers of text and of vision."""
    found = config.get_list(key, [])
    if len(found) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        raise _wrong(
            config, key, f"expected two positive integers (text, vision), found {config.values.get(key)!r:.60}"
        )
    return found[0], found[1]


def _same(config: JsonObject, key: str, largest: int | None = None) -> int | None:
    """The number that both modalities share; each counts as `largest` at most."""
    value = config.values.get(key)
    found = value if isinstance(value, list) else [value]
    if largest is not None:
        found = [largest if n == -1 or (isinstance(n, int) and n > largest) else n for n in found]
    if len(set(map(repr, found))) != 1:
        raise refusal(config, key, _ONE_OF_ALL)
    return found[0]


def _layer_range(text: JsonObject, pattern: list[Any], layers: int) -> dict[str, int]:
    """Which layers are sparse, as first, last and interval."""
    sparse = [i for i, kind in enumerate(pattern) if kind == "sparse"]
    for interval in range(1, layers + 1) if len(pattern) == layers and sparse else ():
        first, last = sparse[0], sparse[-1]
        if sparse == [i for i in range(first, last + 1) if (i + 1) % interval == 0]:
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": interval}
    raise _wrong(text, "mlp_layer_types", f"expected {layers} of dense and sparse, sparse ones at equal distances")


def _wrong(config: JsonObject, key: str, what: str) -> CheckpointError:
    return CheckpointError(f"{config.where}: {key}: {what}. Copy the file again from the model's source.")


def _to_transformers(text: dict[str, Any], vision: VisionConfig, layer_types: list[str]) -> dict[str, Any]:
    outer: dict[str, Any] = {key: text.pop(key) for key in ("architectures", "torch_dtype") if key in text}
    if "torch_dtype" in outer:
        outer["dtype"] = outer.pop("torch_dtype")
    for key in ("rope_theta", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"):
        del text[key]
    hw = (text["head_dim"] // 2 - vision.time_frequencies) // 2
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [hw, hw, vision.time_frequencies]}
    text["model_type"] = f"{MODEL_TYPE}_text"
    text["mlp_layer_types"] = layer_types
    text["moe_intermediate_size"] = [text["moe_intermediate_size"], vision.expert_size]
    inner = dict(vision.extra) | {
        **_written(vision),
        "model_type": f"{MODEL_TYPE}_vision",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "temporal_merge_size": vision.temporal_merge_size,
        "initializer_range": text["initializer_range"],
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
    tokens = {key: vars(vision)[key] for key in _TOKENS}
    both = {"model_type": MODEL_TYPE, "tie_word_embeddings": text["tie_word_embeddings"]}
    return dict(sorted({**outer, **both, **tokens, "text_config": text, "vision_config": inner}.items()))


def _to_baidu(text: dict[str, Any], vision: VisionConfig) -> dict[str, Any]:
    text |= {key: usual[0] for key, usual in _FIXED.items()} | {key: vars(vision)[key] for key in _TOKENS}
    for key in _OF_MODALITIES:
        text[key] = [text[key], text[key]]
    text["moe_intermediate_size"][1] = vision.expert_size
    text["vision_config"] = dict(vision.extra) | {
        **_written(vision),
        "model_type": "DFNRope_vision_transformer",
        "embed_dim": vision.hidden_size,
        "hidden_size": vision.hidden_size,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
    }
    text |= {
        "model_type": MODEL_TYPES["paddle"],
        "im_patch_id": vision.image_token_id,
        "freq_allocation": vision.time_frequencies,
        "pixel_hidden_size": vision.hidden_size,
        "spatial_conv_size": vision.spatial_merge_size,
        "temporal_conv_size": vision.temporal_merge_size,
    }
    return dict(sorted(text.items()))


def _written(vision: VisionConfig) -> dict[str, Any]:
    """See _common."""
    same = ("depth", "num_heads", "in_channels", "patch_size", "spatial_merge_size")
    names = {key: vars(vision)[key] for key in same}
    return names | {"hidden_act": "quick_gelu", "rms_norm_eps": vision.layer_norm_eps}
