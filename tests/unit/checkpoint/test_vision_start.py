"""A vision-language model that begins with the weights of a text model."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_vision import CONFIG, packed_row

from erniekit.build import ModelOptions, load_model, prepare_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.vision_start import VisionStart, joined_config
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.inputs import batch_inputs
from erniekit.moe.layer import MoELayer, TokenInfo
from erniekit.precision import policy
from erniekit.utils.errors import ConfigError

TEXT, VISION = CONFIG["text_config"]["moe_intermediate_size"]


def text_config(**changes: Any) -> dict[str, Any]:
    """The text part of the tiny vision-language model, as a text model."""
    config = copy.deepcopy(CONFIG["text_config"]) | {"model_type": "ernie4_5_moe", "tie_word_embeddings": True}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    return config | {"moe_intermediate_size": TEXT, "moe_layer_start_index": 1} | changes


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model with correction biases that are not 0."""
    path = tmp_path_factory.mktemp("text")
    model = CausalLM(ModelConfig.from_dict(text_config()))
    init_weights(model, 4)
    for number, layer in enumerate(layers_of(model)):
        layer.correction_bias.set_value(paddle.to_tensor(np.float32([[0.1, -0.1, 0.2, number]])))
    save_model(model, path)
    return path


def layers_of(model: CausalLM) -> list[MoELayer]:
    return [layer for layer in model.sublayers() if isinstance(layer, MoELayer)]


def vision_path(directory: Path, **changes: Any) -> Path:
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def started(text_dir: Path, config: ModelConfig, **options: Any) -> CausalLM:
    options = {"vision_start": VisionStart(config, **options)}
    return prepare_model(text_dir, ModelOptions(policy.of_weights("float32", "cpu", None), **options)).build()


@pytest.fixture
def config(text_dir: Path, tmp_path: Path) -> ModelConfig:
    return joined_config(ModelConfig.from_dir(text_dir), text_dir, vision_path(tmp_path))


def test_text_is_computed_as_by_the_text_model_and_the_rest_is_new(text_dir: Path, config: ModelConfig) -> None:
    text, model = load_model(text_dir), started(text_dir, config)
    assert config.rope_theta == 5e5  # the text model's own, not that of the other config.json
    ids = np.arange(3, 40)[None]
    np.testing.assert_array_equal(model(ids).numpy(), text(ids).numpy())
    ours, theirs = dict(model.named_parameters()), dict(text.named_parameters())
    new = {name for name in ours if name not in theirs}
    assert all("vision" in name or "resampler" in name or name.endswith("gate.weight_1") for name in new)
    assert all(np.array_equal(ours[name].numpy(), theirs[name].numpy()) for name in theirs)
    router = ours["model.layers.1.mlp.gate.weight_1"].numpy()
    assert 0.05 < router.std() < 0.2 and not np.allclose(router, theirs["model.layers.1.mlp.gate.weight"].numpy())
    for mine, its in zip(layers_of(model), layers_of(text), strict=True):
        np.testing.assert_array_equal(mine.correction_bias[:1].numpy(), its.correction_bias.numpy())
        assert not mine.correction_bias[1].numpy().any()
    with paddle.no_grad():
        hidden = model.model(batch_inputs(model, packed_row([[3, (1, 4, 2), 5], [(4, 2, 2), 3]]))).normed
    assert np.isfinite(hidden.numpy()).all()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_vision_experts_are_the_first_channels_of_text_experts(
    text_dir: Path, config: ModelConfig, scale: float
) -> None:
    """With equal routing a vision expert gives what the text expert gives from those channels alone."""
    model = started(text_dir, config, down_scale=scale)
    rng = np.random.default_rng(0)
    for layer in layers_of(model):
        layer.gate.weight_1.set_value(layer.gate.weight)
        layer.correction_bias.set_value(paddle.concat([layer.correction_bias[:1]] * 2))
        x = paddle.to_tensor(rng.standard_normal((40, 32), np.float32))
        with paddle.no_grad():
            visual, _ = layer(x, TokenInfo([40], np.ones(40, np.int8)))
            for up_gate in [layer.experts.up_gate_proj.weight]:  # the other channels contribute nothing
                values = up_gate.numpy()
                values[:, :, VISION:TEXT] = 0
                up_gate.set_value(values)
            layer.experts.down_proj.weight.set_value(layer.experts.down_proj.weight * scale)
            text, _ = layer(x, TokenInfo([40], np.zeros(40, np.int8)))
        np.testing.assert_allclose(visual.numpy(), text.numpy(), rtol=0, atol=1e-6)


def test_vision_experts_at_random(text_dir: Path, config: ModelConfig) -> None:
    one, two = (started(text_dir, config, experts_from_text=made) for made in (True, False))
    for name, parameter in two.named_parameters():
        same = np.array_equal(parameter.numpy(), dict(one.named_parameters())[name].numpy())
        assert same != (".vision_experts." in name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 24}, r"vision_config_path: .*text part must be that of the weights: hidden_size 24 \(32 in"),
        ({"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, "other sparse layers"),
    ],
)
def test_a_text_part_of_other_sizes(text_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        joined_config(ModelConfig.from_dir(text_dir), text_dir, vision_path(tmp_path, **changes))


def test_wider_vision_experts_are_refused(text_dir: Path, tmp_path: Path) -> None:
    wide = vision_path(tmp_path, moe_intermediate_size=[TEXT, TEXT + 1])
    config = joined_config(ModelConfig.from_dir(text_dir), text_dir, wide)
    with pytest.raises(ConfigError, match=r"vision_experts_from_text: vision experts \(17 channels\) are wider"):
        started(text_dir, config)


def test_models_of_the_wrong_kind(text_dir: Path, tmp_path: Path) -> None:
    text = ModelConfig.from_dir(text_dir)
    with pytest.raises(ConfigError, match="is of a model of text alone"):
        joined_config(text, text_dir, text_dir)
    vision = vision_path(tmp_path)
    with pytest.raises(ConfigError, match="is a vision-language model already"):
        joined_config(ModelConfig.from_dir(vision), vision, vision)
