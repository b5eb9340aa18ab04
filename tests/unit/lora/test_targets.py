"""Which names mean which projections."""

import pytest

from erniekit.lora.targets import choose, choose_saved, default_targets, hf_name, vision_language_path
from erniekit.utils.errors import ConfigError

ATTENTION = [f"model.layers.{i}.self_attn.{leaf}.weight" for i in range(2) for leaf in ("qkv_proj", "o_proj")]
NAMES = [
    "model.embed_tokens.weight",
    *ATTENTION,
    "model.layers.0.mlp.up_gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.experts.up_gate_proj.weight",
    "model.layers.1.mlp.experts.down_proj.weight",
    "model.layers.1.mlp.shared_experts.up_gate_proj.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "model.mtp_block.0.self_attn.qkv_proj.weight",
]
EXPERTS = "model.layers.1.mlp.experts"


def test_the_default_is_everything_but_the_router_and_multi_token_prediction():
    chosen = choose(NAMES, default_targets(NAMES))
    assert len(chosen) == 10
    assert chosen["model.layers.0.self_attn.qkv_proj"] == ("q", "k", "v")
    assert chosen["model.layers.0.mlp.up_gate_proj"] == ("gate", "up")
    assert chosen[f"{EXPERTS}.up_gate_proj"] == ("",)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", {f"model.layers.{i}.self_attn.qkv_proj": ("q",) for i in range(2)}),
        ("layers.1.self_attn.v_proj", {"model.layers.1.self_attn.qkv_proj": ("v",)}),
        ("experts.down_proj", {f"{EXPERTS}.down_proj": ("",)}),
        ("experts.gate_up_proj", {f"{EXPERTS}.up_gate_proj": ("",)}),
        (r".*layers\.0\.self_attn\.(k|o)_proj", {"model.layers.0.self_attn.qkv_proj": ("k",)}),
        (r".*\.experts\.\d+\.down_proj", {f"{EXPERTS}.down_proj": ("",)}),
        (r".*\.shared_experts\..*_proj", {"model.layers.1.mlp.shared_experts.up_gate_proj": ("gate", "up")}),
        ("mlp.down_proj", {"model.layers.0.mlp.down_proj": ("",)}),
    ],
)
def test_a_target(target: str, expected: dict):
    chosen = choose(NAMES, (target,))
    assert expected.items() <= chosen.items()
    assert len(chosen) - len(expected) == {
        r".*layers\.0\.self_attn\.(k|o)_proj": 1,
        r".*\.shared_experts\..*_proj": 1,
    }.get(target, 0)


def test_both_halves_of_the_experts_are_one_adapter():
    chosen = choose(NAMES, ("gate_proj", "up_proj"))
    assert chosen[f"{EXPERTS}.up_gate_proj"] == ("",)
    assert chosen["model.layers.1.mlp.shared_experts.up_gate_proj"] == ("gate", "up")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gatte_proj", "did you mean gate_proj?"),
        ("all-linear", "leave the key out"),
        ("qproj", "did you mean q_proj?"),
        ("gate", "the router is not adapted"),
        ("lm_head", "put it into modules_to_save: lm_head"),
        ("gate_proj", "without the other half"),
        (r".*nothing.*", "matches no projection"),
    ],
)
def test_a_wrong_target_says_what_would_be_right(target: str, message: str):
    with pytest.raises(ConfigError, match="lora_target_modules") as caught:
        choose(NAMES, (target,))
    assert message in str(caught.value)


def test_hugging_face_names():
    assert hf_name("model.layers.0.self_attn.qkv_proj", "k") == "model.layers.0.self_attn.k_proj"
    assert hf_name(f"{EXPERTS}.up_gate_proj", "") == f"{EXPERTS}.gate_up_proj"
    assert hf_name("model.layers.0.mlp.down_proj", "") == "model.layers.0.mlp.down_proj"


def test_modules_to_save():
    assert choose_saved(NAMES, ("norm",), tied=True) == ("model.norm.weight",)
    assert choose_saved(NAMES, ("layers.0.input_layernorm", "embed_tokens"), tied=True) == (
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    )
    with pytest.raises(ConfigError, match="its embeddings"):
        choose_saved(NAMES, ("lm_head",), tied=True)
    for wrong, right in (
        ("embed_token", r"did you mean embed_tokens\? There are"),
        ("q_proj", r"trained whole\. There are .*; projections are adapted"),
    ):
        with pytest.raises(ConfigError, match=right):
            choose_saved(NAMES, (wrong,), tied=True)


VISUAL = [
    *NAMES,
    "model.layers.1.mlp.gate.weight_1",
    "model.layers.1.mlp.vision_experts.up_gate_proj.weight",
    "model.layers.1.mlp.vision_experts.down_proj.weight",
    "model.vision_model.patch_embed.proj.weight",
    *(
        f"model.vision_model.blocks.{i}.{leaf}.weight"
        for i in range(2)
        for leaf in ("attn.qkv", "attn.proj", "mlp.fc1")
    ),
    "model.vision_model.blocks.0.norm1.weight",
    *(f"model.resampler_model.{name}_linear.{i}.weight" for name in ("spatial", "temporal") for i in (0, 2, 3)),
    "model.resampler_model.mlp.weight",
]


def test_the_default_of_a_vision_language_model_adds_vision_experts_and_resampler():
    """As in ERNIEKit; not the vision transformer, not the resampler's last projection."""
    added = choose(VISUAL, default_targets(VISUAL)).keys() - choose(NAMES, default_targets(NAMES)).keys()
    assert added == {
        "model.layers.1.mlp.vision_experts.up_gate_proj",
        "model.layers.1.mlp.vision_experts.down_proj",
        *(f"model.resampler_model.{name}_linear.{i}" for name in ("spatial", "temporal") for i in (0, 2)),
    }


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r"model\.vision_model\..*", 7),
        (r"model\.vision_tower\.blocks\..*", 6),
        ("attn.qkv", 2),
        ("vision_moe.experts.gate_up_proj", 1),
        ("experts.down_proj", 2),  # as the path ends in transformers; not the shared experts
        ("fc1", 4),
        (r"model\.language_model\.layers\.\d+\.self_attn\.q_proj", 2),
        ("model.layers.0.self_attn.q_proj", 1),
    ],
)
def test_a_target_of_a_vision_language_model(target: str, expected: int):
    """Names of ours, of files and of transformers' model."""
    assert len(choose(VISUAL, (target,))) == expected


def test_paths_of_a_vision_language_model():
    paths = {
        "model.layers.3.self_attn.q_proj": "model.language_model.layers.3.self_attn.q_proj",
        "model.layers.3.mlp.experts.down_proj": "model.language_model.layers.3.mlp.text_moe.experts.down_proj",
        "model.layers.3.mlp.vision_experts": "model.language_model.layers.3.mlp.vision_moe.experts",
        "model.layers.3.mlp.shared_experts.up_proj": "model.language_model.layers.3.mlp.shared_experts.up_proj",
        "model.norm.weight": "model.language_model.norm.weight",
        "model.vision_model.blocks.0.attn.qkv": "model.vision_tower.blocks.0.attn.qkv",
        "model.resampler_model.temporal_linear.2": "model.resampler_model.temporal_linear.fc2",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: vision_language_path(name) for name in paths} == paths
