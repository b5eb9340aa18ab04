"""Stage 2 as a user starts it: a text model becomes a vision-language model (vision_config_path)."""

from pathlib import Path
from typing import Any

import pytest
from support.tiny_vision import CONFIG
from support.vision_directories import vision_config, vision_workspace

import erniekit
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.cli.main import main
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.utils.errors import ConfigError


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A YAML whose model has config.json, tokenizer and processor files, and keys that start from a text model."""
    yaml = vision_workspace(tmp_path_factory.mktemp("vl"))
    text, vision = yaml.parent / "text", yaml.parent / "vl"
    config = vision_config()["text_config"] | {"model_type": "ernie4_5_moe", "tie_word_embeddings": True}
    config |= {"moe_intermediate_size": CONFIG["text_config"]["moe_intermediate_size"][0], "moe_layer_start_index": 1}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    model = CausalLM(ModelConfig.from_dict(config))
    init_weights(model, 4)
    save_model(model, text)
    keys = {"model_name_or_path": str(text), "tokenizer_name_or_path": str(vision), "vision_config_path": str(vision)}
    return yaml, keys | {"continue_training": True}


def weights(path: Path) -> dict[str, bytes]:
    reader = Reader(path)
    return {name: reader.read(name).tobytes() for name in reader.keys()}  # noqa: SIM118 no mapping


def test_a_text_model_becomes_a_vision_language_model(workspace: tuple[Path, dict[str, Any]]) -> None:
    yaml, keys = workspace
    result = erniekit.train(str(yaml), **keys, max_steps=4, save_steps=2)
    losses = [record["loss"] for record in result.history]
    assert len(losses) == 4 and losses[-1] < losses[0]
    out = yaml.parent / "out"
    model = erniekit.load_model(out)
    assert model.config.vision is not None
    names = {path.name for path in out.iterdir()}
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"} <= names
    assert erniekit.load_processor(out) is not None
    # What it saved is a vision-language model, so the chain goes on without the key.
    erniekit.train(
        str(yaml),
        model_name_or_path=str(out),
        continue_training=True,
        max_steps=1,
        output_dir=str(yaml.parent / "next"),
    )


def test_resuming_repeats_an_uninterrupted_run(workspace: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    yaml, keys = workspace
    erniekit.train(str(yaml), **keys, max_steps=4, save_steps=2, output_dir=str(tmp_path / "whole"))
    erniekit.train(str(yaml), **keys, max_steps=4, save_steps=2, output_dir=str(tmp_path / "parts"))
    (tmp_path / "parts" / "checkpoint-4" / "config.json").unlink()
    erniekit.train(str(yaml), **keys, max_steps=4, save_steps=2, output_dir=str(tmp_path / "parts"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_check_says_what_the_model_becomes(
    workspace: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml, keys = workspace
    words = [f"{key}={value}" for key, value in (keys | {"output_dir": tmp_path / "checked"}).items()]
    main(["check", str(yaml), *words])
    assert "text: ernie4_5_vl_moe, 81,424 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continue_training": False}, "vision_config_path: it adds vision to the weights of a text model"),
        ({"fine_tuning": "LoRA"}, "vision_config_path: fine_tuning: LoRA would not train"),
        ({"vision_config_path": "{text}"}, "is of a model of text alone"),
        ({"model_name_or_path": "{vision}"}, "is a vision-language model already"),
    ],
)
def test_what_cannot_be(workspace: tuple[Path, dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    yaml, keys = workspace
    places = {"{text}": yaml.parent / "text", "{vision}": yaml.parent / "vl"}
    changes = {
        key: str(places.get(value, value)) if isinstance(value, str) else value for key, value in changes.items()
    }
    with pytest.raises(ConfigError, match=message):
        erniekit.train(str(yaml), **(keys | changes), output_dir=str(yaml.parent / "refused"))
