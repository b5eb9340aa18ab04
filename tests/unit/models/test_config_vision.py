"""The config.json of vision-language models in both spellings."""

import copy
import json
from typing import Any

import pytest
from support.tiny_vision import CONFIG

from erniekit.models.config import ModelConfig
from erniekit.models.weights import num_parameters
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

# The published 28B-A3B model in Baidu's spelling; the end of the layers counts those that were cut off.
BAIDU: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "freq_allocation": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "im_patch_id": 100295,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe_vl",
    "moe_capacity": [128, 128, 128],
    "moe_gate": "topk",
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_layer_start_index": [1, 1],
    "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
    "moe_num_experts": [64, 64],
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "moe_use_hard_gate": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pixel_hidden_size": 1280,
    "rms_norm_eps": 1e-5,
    "rope_3d": True,
    "rope_theta": 500000.0,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_temporal_conv": True,
    "vision_config": {
        "attn_implementation": "eager",
        "attn_sep": True,
        "depth": 32,
        "embed_dim": 1280,
        "hidden_act": "quick_gelu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "mlp_ratio": 4,
        "model_type": "DFNRope_vision_transformer",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
    },
    "vocab_size": 103424,
}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The configuration with one key, perhaps of an inner object, replaced."""
    out = copy.deepcopy(config)
    *outer, key = path.split(".")
    inner = out
    for name in outer:
        inner = inner[name]
    inner[key] = value
    return out


def test_the_published_model_in_baidus_spelling():
    config = ModelConfig.from_dict(BAIDU)
    assert config.model_type == "ernie4_5_vl_moe" and config.vision is not None
    assert config.expert_sizes == (1536, 512) and config.moe_num_experts == 64
    assert config.layer_types == ["dense"] + ["sparse"] * 27
    vision = config.vision
    assert (vision.depth, vision.hidden_size, vision.intermediate_size, vision.head_dim) == (32, 1280, 5120, 80)
    assert vision.time_frequencies == 20 and vision.placeholders == (100295, 103367)
    assert config.extra["moe_use_aux_free"] is True and config.dtype == "bfloat16"
    assert 28e9 < num_parameters(config) < 31e9


def test_baidus_spelling_becomes_what_transformers_reads():
    written = ModelConfig.from_dict(BAIDU).to_dict("pt")
    assert written["model_type"] == "ernie4_5_vl_moe" and written["dtype"] == "bfloat16"
    text, vision = written["text_config"], written["vision_config"]
    assert text["moe_intermediate_size"] == [1536, 512] and text["moe_num_experts"] == 64
    assert text["mlp_layer_types"] == ["dense"] + ["sparse"] * 27
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]}
    assert vision["intermediate_size"] == 5120 and vision["temporal_merge_size"] == 2
    assert written["image_token_id"] == 100295 and written["video_token_id"] == 103367


@pytest.mark.parametrize("source", [BAIDU, CONFIG], ids=["baidu", "transformers"])
@pytest.mark.parametrize("first", ["pt", "paddle"])
@pytest.mark.parametrize("second", ["pt", "paddle"])
def test_written_and_read_again_is_the_same_model(source: dict[str, Any], first: str, second: str):
    config = ModelConfig.from_dict(source)
    for format in (first, second):
        again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(format))))
        assert again == config


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("my_note", 1, "my_note: 1 is not known here and not used"),
        ("vocab_size", 9, "vocab_size: 9 is not used: text_config has 64"),
        ("vision_config.window_size", 112, "vision_config: window_size: 112 is not known here and not used"),
        ("vision_config.attention_dropout", 0.5, "vision_config: attention_dropout: 0.5 is not used"),
    ],
)
def test_a_key_that_is_not_used_is_named_and_kept(path: str, value: Any, line: str, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(log, "once", lines.append)
    written = ModelConfig.from_dict(changed(CONFIG, path, value), "c.json").to_dict("pt")
    assert len(lines) == 1 and lines[0].startswith(f"c.json: {line}")
    *outer, key = path.split(".")
    assert key == "vocab_size" or written[outer[0] if outer else "text_config"][key] == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("sliding_window", 128),
        ("hidden_act", "gelu"),
        ("vision_config.qk_norm", True),
    ],
)
def test_a_key_that_would_change_the_model_is_refused_wherever_it_stands(path: str, value: Any):
    with pytest.raises(CheckpointError, match=path.rpartition(".")[2]):
        ModelConfig.from_dict(changed(CONFIG, path, value))


def test_the_published_keys_are_no_line(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(log, "once", lines.append)
    for config in (BAIDU, CONFIG, ModelConfig.from_dict(BAIDU).to_dict("pt")):
        ModelConfig.from_dict(config)
    assert not lines


def test_patterns_of_sparse_layers_survive():
    types = ["dense", "sparse", "dense", "sparse"]
    config = ModelConfig.from_dict(changed(CONFIG, "text_config.mlp_layer_types", types))
    assert config.layer_types == types and config.to_dict("pt")["text_config"]["mlp_layer_types"] == types


def test_a_small_vocabulary_of_baidus_has_one_placeholder():
    """The id of transformers' video placeholder is beyond it."""
    small = changed(changed(BAIDU, "vocab_size", 2000), "im_patch_id", 1000)
    vision = ModelConfig.from_dict(small).vision
    assert vision is not None and vision.placeholders == (1000, 1000)


@pytest.mark.parametrize(
    ("config", "path", "value", "words"),
    [
        (BAIDU, "moe_num_experts", [64, 32], ["moe_num_experts", "both modalities"]),
        (BAIDU, "moe_intermediate_size", 1536, ["moe_intermediate_size", "must be a list"]),
        (BAIDU, "moe_layer_start_index", [1, 2], ["moe_layer_start_index", "both modalities"]),
        (BAIDU, "rope_3d", False, ["rope_3d"]),
        (BAIDU, "moe_use_hard_gate", False, ["moe_use_hard_gate"]),
        (BAIDU, "mm_vocab_size", 100, ["mm_vocab_size"]),
        (BAIDU, "pixel_hidden_size", 1024, ["pixel_hidden_size", "1280"]),
        (BAIDU, "spatial_conv_size", 4, ["spatial_conv_size", "spatial_merge_size"]),
        (BAIDU, "temporal_conv_size", 4, ["temporal_merge_size 4"]),
        (BAIDU, "im_patch_id", 200000, ["image_token_id", "vocabulary of 103424"]),
        (BAIDU, "vision_config.hidden_act", "gelu", ["vision_config", "hidden_act", "quick_gelu"]),
        (BAIDU, "vision_config.num_heads", 7, ["vision_config", "num_heads 7"]),
        (BAIDU, "vision_config.in_chans", 1, ["in_chans", "in_channels differs"]),
        (BAIDU, "vision_config.depth", 0, ["vision_config", "depth"]),
        (BAIDU, "freq_allocation", 21, ["21 of 64 rotary frequencies", "even"]),
        (CONFIG, "text_config.rope_parameters.mrope_section", [3, 1, 2], ["mrope_section"]),
        (CONFIG, "text_config.rope_parameters.mrope_section", 5, ["mrope_section", "must be a list"]),
        (CONFIG, "text_config.num_hidden_layers", 1 << 40, ["num_hidden_layers", "must be an integer"]),
        (BAIDU, "rope_scaling", {"rope_type": "ernie_3d", "freq_allocation": "x"}, ["freq_allocation", "must be"]),
        (CONFIG, "text_config.mlp_layer_types", ["sparse", "sparse", "dense", "sparse"], ["mlp_layer_types"]),
        (CONFIG, "vision_config.in_channels", 1, ["in_channels 1"]),
        (CONFIG, "video_token_id", 64, ["video_token_id", "vocabulary"]),
        (CONFIG, "text_config.hidden_size", None, ["text_config", "hidden_size"]),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(config, path, value, words):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict(changed(config, path, value), source="/some/config.json")
    for word in ["/some/config.json", *words]:
        assert word in str(error.value)
