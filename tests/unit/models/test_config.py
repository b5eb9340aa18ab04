"""What a config.json means, whoever wrote it."""

import dataclasses
import json

import pytest

from erniekit.models.config import ModelConfig
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

DENSE = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MOE = {
    **{key: value for key, value in DENSE.items() if key != "head_dim"},
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "num_nextn_predict_layers": 1,
}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_dense_values_and_defaults():
    config = ModelConfig.from_dict(without(DENSE, "rope_theta", "rms_norm_eps", "tie_word_embeddings"))
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (64, 32, 2)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (500000.0, 1e-5, True)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.moe_num_experts == 0 and not config.is_moe_layer(3)
    assert hash(config) and dataclasses.replace(config, tie_word_embeddings=False).tie_word_embeddings is False


def test_head_dim_follows_transformers():
    assert ModelConfig.from_dict(without(DENSE, "head_dim")).head_dim == 128
    assert ModelConfig.from_dict({**DENSE, "head_dim": None}).head_dim == 16
    assert ModelConfig.from_dict(MOE).head_dim == 16
    assert ModelConfig.from_dict({**MOE, "head_dim": None}).head_dim == 16
    assert ModelConfig.from_dict({**MOE, "head_dim": 32}).head_dim == 32


def test_null_kv_heads_means_as_many_as_heads():
    assert ModelConfig.from_dict({**DENSE, "num_key_value_heads": None}).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}, "rope_scaling": None}, 7.0),
        ({"rope_parameters": None}, 500000.0),
        # transformers 5: rope_scaling is the older name of rope_parameters and comes first.
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 9.0}}, 9.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 9}, "rope_theta": 7.0}, 9.0),
        ({"rope_scaling": {"rope_theta": 9.0}, "rope_parameters": {"rope_theta": 8.0}}, 9.0),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 8.0}, "rope_theta": 7.0}, 7.0),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 8.0}}, 8.0),
    ],
)
def test_both_spellings_of_theta(rope, theta):
    assert ModelConfig.from_dict({**without(DENSE, "rope_theta"), **rope}).rope_theta == theta


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16, "truncate": False},
    ],
)
@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_scaling_of_positions_is_read_and_written(scaling, format):
    config = ModelConfig.from_dict({**DENSE, "rope_scaling": scaling})
    assert config.rope_scaling is not None and config.rope_scaling.kind == scaling["rope_type"]
    out = config.to_dict(format)
    written = out["rope_parameters"] if format == "pt" else out["rope_scaling"]
    assert written == scaling | {"rope_theta": config.rope_theta}
    assert ModelConfig.from_dict(out).rope_scaling == config.rope_scaling
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert ModelConfig.from_dict({**DENSE, "rope_parameters": old}).rope_scaling == config.rope_scaling


def test_two_values_of_theta_are_said_once_to_each_reader():
    for _ in range(2):
        with log.captured() as said:
            for inner in (10000, 9.5, 9.5):
                ModelConfig.from_dict({**DENSE, "rope_parameters": {"rope_theta": inner}})
        ((is_warning, text),) = said
        assert is_warning and "10000 at the top level, 9.5 in rope_parameters" in text


def test_moe_layers():
    config = ModelConfig.from_dict(MOE)
    assert config.moe_layer_end_index == 3
    assert [config.is_moe_layer(i) for i in range(4)] == [False, True, True, True]
    config = ModelConfig.from_dict(
        {**MOE, "moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 2}
    )
    assert [config.is_moe_layer(i) for i in range(4)] == [False, True, False, False]
    assert ModelConfig.from_dict({**MOE, "moe_layer_end_index": None}).moe_layer_end_index == 3


def test_extra_keys_survive_but_not_those_of_the_other_format():
    source = {
        **MOE,
        "dtype": "bfloat16",
        "moe_capacity": [64, 64, 64],
        "fuse_rope": True,
        "paddlenlp_version": None,
        "eos_token_id": [2, 5],
        "novel": {"a": 1},
    }
    config = ModelConfig.from_dict(source)
    assert config.eos_token_id == 2
    pt, paddle = config.to_dict("pt"), config.to_dict("paddle")
    for out in (pt, paddle):
        assert out["moe_capacity"] == [64, 64, 64] and out["novel"] == {"a": 1} and out["eos_token_id"] == [2, 5]
        assert out["architectures"] == ["Ernie4_5_MoeForCausalLM"] and out["rope_theta"] == 10000
    assert (
        "fuse_rope" not in pt
        and "paddlenlp_version" not in pt
        and pt["torch_dtype"] == "bfloat16"
        and "dtype" not in pt
    )
    assert (
        paddle["fuse_rope"] is True
        and paddle["dtype"] == "bfloat16"
        and "torch_dtype" not in paddle
        and "rope_parameters" not in paddle
    )


def test_keys_of_paddle_s_kernels_and_losses_do_not_reach_a_pt_config():
    keys = (
        "add_tail_layers compression_ratio fuse_linear fuse_ln fuse_rms_norm fuse_rope fuse_swiglu global_aux_loss "
        "fuse_gate_detach_matmul moe_aux_loss_lambda moe_group_orthogonal_loss moe_orthogonal_loss_lambda "
        "moe_z_loss_lambda use_fast_ln use_flash_attention use_rmsnorm max_sequence_length paddlenlp_version"
    ).split()
    config = ModelConfig.from_dict({**MOE, **dict.fromkeys(keys, 1)})
    assert not set(keys) & config.to_dict("pt").keys()
    assert set(keys) <= config.to_dict("paddle").keys()


def test_remote_code_and_transformers_keys_are_not_carried_to_paddle():
    config = ModelConfig.from_dict(
        {**DENSE, "auto_map": {"AutoConfig": "x.Y"}, "transformers_version": "5", "torch_dtype": "float16"}
    )
    assert "auto_map" not in config.to_dict("pt") and config.to_dict("pt")["transformers_version"] == "5"
    assert not {"auto_map", "transformers_version", "torch_dtype"} & config.to_dict("paddle").keys()
    assert config.to_dict("paddle")["dtype"] == "float16"


def test_architectures_are_each_side_s_class_names():
    config = ModelConfig.from_dict(DENSE)
    assert config.to_dict("pt")["architectures"] == ["Ernie4_5ForCausalLM"]
    assert config.to_dict("paddle")["architectures"] == ["Ernie4_5_ForCausalLM"]
    for name in ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"):
        assert ModelConfig.from_dict({**without(DENSE, "model_type"), "architectures": [name]}).model_type == "ernie4_5"


@pytest.mark.parametrize("source", [DENSE, MOE])
@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_written_config_reads_back_equal(source, format):
    config = ModelConfig.from_dict(source)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(format))))
    assert again == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "ernie4_5_vl_moe"}, ["model_type", "vision-language", "vision_config is missing"]),
        ({"model_type": "ernie4_5_moe_vl"}, ["model_type", "vision-language"]),
        ({"vision_config": {"depth": 2}}, ["vision_config"]),
        ({"model_type": "llama"}, ["model_type", "llama"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["rope_scaling", "llama3", "one of default, linear"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0}}, ["rope_parameters: factor", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling: factor", "from 1"]),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}}, ["beta_fast 32", "linear"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 7}},
            ["original_max_position_embeddings: 7", "max_position_embeddings"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"compression_ratio": 2.0}, ["compression_ratio"]),
        ({"use_rmsnorm": False}, ["use_rmsnorm"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers", "integer"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads"]),
        ({"head_dim": 7}, ["head_dim"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": 1e999}, ["rms_norm_eps", "inf"]),
        ({"rope_theta": "10000"}, ["rope_theta", "number"]),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, ["rope_scaling", "factor 8.0"]),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": [1]}}, ["rope_scaling: rope_theta"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, ["rope_parameters", "full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, ["layer_types", "4 x full_attention"]),
        ({"use_qk_norm": True}, ["use_qk_norm"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        ({"remove_tail_layer": 2}, ["remove_tail_layer"]),
        ({"num_experts": 8}, ["model_type", "ernie4_5_moe"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn"]),
        ({"vocab_size": 10**12}, ["vocab_size", "1000000000000"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers"]),
        ({"hidden_size": 10**7, "intermediate_size": 10**7, "num_hidden_layers": 4000}, ["hidden_size", "parameters"]),
        ({"eos_token_id": 512}, ["eos_token_id", "512", "vocabulary"]),
        ({"eos_token_id": [2, -7]}, ["eos_token_id", "-7"]),
        ({"pad_token_id": True}, ["pad_token_id"]),
        ({"architectures": "Ernie"}, ["architectures", "a list"]),
    ],
)
def test_bad_values_name_the_file_and_the_key(change, words):
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict({**DENSE, **change}, source="/some/config.json")
    for word in ["/some/config.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_gate": "hash"}, "moe_gate"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ({"mlp_layer_types": ["sparse"] * 4}, "1 x dense, 3 x sparse"),
        ({"moe_use_aux_free": "yes"}, "moe_use_aux_free: must be true or false"),
        ({"moe_capacity": ["64"]}, "moe_capacity: must be a list of numbers"),
        ({"num_experts_per_tok": 1}, "moe_k 2 and num_experts_per_tok 1"),
        ({"moe_layer_start_index": 4}, "leave no layer of 4 with experts"),
        ({"moe_num_experts": 60000, "num_hidden_layers": 50}, "too many"),
    ],
)
def test_settings_of_experts_that_would_make_another_model(change, words):
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_dict({**MOE, **change})


def test_transformers_other_names_of_two_sizes():
    config = ModelConfig.from_dict(
        {**without(MOE, "moe_num_experts", "moe_k"), "num_experts": 8, "num_experts_per_tok": 2}
    )
    assert (config.moe_num_experts, config.moe_k) == (8, 2)
    assert "num_experts" not in config.to_dict()


def test_what_is_not_used_is_named_and_what_does_nothing_is_not(capfd):
    named = {"hidden_dropout_prob": 0.1, "rope_thetta": 7.0, "moe_capacity": [2, 2], "output_router_logits": True}
    quiet = {
        "attention_dropout": 0.0,
        "use_cache": True,
        "transformers_version": "5.23.0",
        "moe_use_aux_free": True,
        "moe_capacity": [64, 64, 64],
        "rope_scaling": None,
        "quantization_config": None,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 4,
        "fuse_rope": True,
        "id2label": {"0": "x"},
    }
    ModelConfig.from_dict({**MOE, **quiet}, source="quiet/config.json")
    assert capfd.readouterr().err == ""
    for _ in range(2):
        ModelConfig.from_dict({**MOE, **named}, source="named/config.json")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(named)  # each once
    for key in named:
        assert any(f"named/config.json: {key}: " in line and "not used" in line for line in lines)


def test_token_ids_may_be_none():
    config = ModelConfig.from_dict({**DENSE, "eos_token_id": None, "pad_token_id": -1, "bos_token_id": None})
    assert (config.end_ids, config.pad_token_id, config.bos_token_id) == ((), -1, None)
    assert config.to_dict()["eos_token_id"] is None
    assert ModelConfig.from_dict({**DENSE, "eos_token_id": [2, 5]}).end_ids == (2, 5)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_key_value_heads", "moe_k", "moe_num_experts"])
def test_missing_keys_are_named(key):
    with pytest.raises(CheckpointError, match=f"{key}: missing"):
        ModelConfig.from_dict(without(MOE, key))


def test_moe_list_of_experts_is_vision_language():
    with pytest.raises(CheckpointError, match="vision-language"):
        ModelConfig.from_dict({**MOE, "moe_num_experts": [64, 64]})
    with pytest.raises(CheckpointError, match="moe_k"):
        ModelConfig.from_dict({**MOE, "moe_k": 9})


def test_from_dir(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json not found"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON: .* column 2"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(without(DENSE, "model_type")))
    assert ModelConfig.from_dir(str(tmp_path)).model_type == "ernie4_5"


@pytest.mark.parametrize("source", [DENSE, MOE])
def test_transformers_reads_what_we_write_without_remote_code(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_dict(
        {
            **source,
            "torch_dtype": "bfloat16",
            "moe_capacity": [64, 64, 64],
            "fuse_rope": True,
            "num_key_value_heads": None,
        }
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict("pt")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (
        type(theirs).__name__ == {"ernie4_5": "Ernie4_5Config", "ernie4_5_moe": "Ernie4_5_MoeConfig"}[config.model_type]
    )
    assert (
        theirs.rope_parameters["rope_theta"] == 10000
        and theirs.head_dim == config.head_dim
        and theirs.num_key_value_heads == 4
    )
    if config.moe_num_experts:
        assert theirs.moe_layer_end_index == config.moe_layer_end_index
    theirs.save_pretrained(tmp_path)
    again = ModelConfig.from_dir(tmp_path)
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(config, extra={})
