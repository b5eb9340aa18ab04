"""Frozen parts of a model: no gradient, no optimizer state, not a bit changed."""

from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_model
from support.vision_directories import vision_config, vision_workspace

import erniekit
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.config import Config
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.training.freezing import check_frozen, freeze
from erniekit.utils.errors import ConfigError


def tensors(path: Path) -> dict[str, bytes]:
    reader = Reader(path)
    return {name: reader.read(name).tobytes() for name in reader.keys()}  # noqa: SIM118 no mapping


def names(**keys: Any) -> set[str]:
    """The parameters that a tiny vision-language model does not train with these keys."""
    model = CausalLM(ModelConfig.from_dict(vision_config()))
    freeze(model, Config(**keys))
    return {name for name, parameter in model.named_parameters() if parameter.stop_gradient}


def test_what_the_words_mean() -> None:
    everything = {name for name, _ in CausalLM(ModelConfig.from_dict(vision_config())).named_parameters()}
    assert names() == set()
    transformer = {name for name in everything if name.startswith("model.vision_model.")}
    resampler = {name for name in everything if name.startswith("model.resampler_model.")}
    experts = {name for name in everything if "vision_experts" in name or name.endswith("gate.weight_1")}
    assert transformer and resampler and experts
    assert names(freeze_config=("freeze_vision",)) == transformer
    assert names(freeze_config=("freeze_lm",)) == everything - transformer - resampler - experts
    both = names(freeze_config=("freeze_vision", "freeze_lm"), frozen_parameters=("resampler",))
    assert both == everything - experts
    assert names(frozen_parameters=(r".*\.input_layernorm\.weight", "vision_experts")) == experts | {
        f"model.layers.{number}.input_layernorm.weight" for number in (0, 1)
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"frozen_parameters": ("vision_towr",)}, "frozen_parameters: vision_towr means no parameter"),
        ({"frozen_parameters": (".*",)}, "every parameter is frozen"),
    ],
)
def test_what_means_nothing_or_everything_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_frozen(Config(**keys), ModelConfig.from_dict(vision_config()))


def test_freezing_vision_needs_a_model_that_sees() -> None:
    with pytest.raises(ConfigError, match=r"freeze_config: freeze_vision means no parameter .* parts are language"):
        check_frozen(Config(freeze_config=("freeze_vision",)), tiny_model("moe").config)


@pytest.mark.parametrize(
    ("keys", "frozen", "moved"),
    [
        ({"freeze_config": "freeze_vision"}, ["vision_model."], ["resampler", "mlp.gate.weight", "embed_tokens"]),
        (
            {"freeze_config": "freeze_vision freeze_lm", "recompute": True},
            ["vision_model.", "embed_tokens", "self_attn", "layernorm", "shared_experts", "mlp.gate.weight"],
            ["resampler", "mlp.gate.weight_1"],
        ),
        ({"frozen_parameters": "vision_experts,.*self_attn.*"}, ["self_attn", "mlp.gate.weight_1"], ["vision_model."]),
    ],
)
def test_a_frozen_parameter_is_bit_equal_and_has_no_state(
    tmp_path: Path, keys: dict[str, Any], frozen: list[str], moved: list[str]
) -> None:
    yaml = vision_workspace(tmp_path, weights=True)
    keys = {
        "weight_decay": 0.1,
        "moe_use_aux_free": True,
        "max_steps": 3,
        "save_steps": 3,
        "save_format": "paddle",
        **keys,
    }
    result = erniekit.train(str(yaml), **keys)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    before = erniekit.load_model(str(tmp_path / "vl")).state_dict()
    after = erniekit.load_model(str(tmp_path / "out")).state_dict()
    same = {name for name in before if (before[name] == after[name]).all()}
    state = {name.rpartition("/")[0] for name in tensors(tmp_path / "out" / "checkpoint-3" / "optimizer")}

    def has(word: str, name: str) -> bool:
        return name.endswith(word) if word.startswith("mlp.gate") else word in name

    for word in frozen:
        hits = {name for name in before if has(word, name)}
        assert hits and hits <= same and not hits & state, word
    for word in moved:
        hits = {name for name in before if has(word, name)}
        assert hits & state and not hits <= same, word


def test_the_correction_bias_of_a_frozen_router_stays(tmp_path: Path) -> None:
    yaml = vision_workspace(tmp_path, weights=True)
    keys = {"moe_use_aux_free": True, "moe_use_aux_free_update_coef": 0.1, "max_steps": 1}
    erniekit.train(str(yaml), freeze_config="freeze_lm", **keys)
    before, after = (erniekit.load_model(str(tmp_path / name)).model.layers[1].mlp for name in ("vl", "out"))
    assert (before.bias_of(0) == after.bias_of(0)).all() and (before.bias_of(1) != after.bias_of(1)).any()
