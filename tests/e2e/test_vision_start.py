"""Stage 2 as a user starts it: a text model becomes a vision-language model (vision_config_path)."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_vision import CONFIG
from support.vision_directories import vision_config, vision_workspace

import erniekit
from erniekit import config
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.cli.main import main
from erniekit.generation.load import open_model
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


def test_commands_before_the_training_use_the_model_that_it_starts_from(
    workspace: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval` reports what an evaluation of the untrained model reports, and `check` and `chat` see its pictures."""
    yaml, keys = workspace
    keys = keys | {"eval_dataset_type": "messages", "eval_dataset_path": str(yaml.parent / "train.jsonl")}
    untrained = tmp_path / "untrained"
    words = [f"{key}={value}" for key, value in (keys | {"output_dir": untrained, "eval_output": tmp_path}).items()]
    assert main(["check", str(yaml), "command=eval", *words]) == 0
    assert "text: ernie4_5_vl_moe, 81,424 parameters" in capsys.readouterr().out
    assert main(["eval", str(yaml), *words]) == 0
    assert "is a model of text, and its vision part is not trained yet" in capsys.readouterr().err
    by_command = json.loads((tmp_path / "eval_results.json").read_text("utf-8"))
    # A step with a rate of almost nothing leaves the model as it was.
    more = {"max_steps": 1, "learning_rate": 1e-12, "output_dir": str(tmp_path / "out"), "do_eval": True}
    in_training = erniekit.train(str(yaml), **keys, **more, save_strategy="no").summary
    for name in ("loss", "loss_image", "loss_video"):
        assert by_command[name] == pytest.approx(in_training[f"eval_{name}"], rel=1e-5), name
    chat = open_model(config.load(str(yaml), {**keys, "output_dir": str(untrained)}, "chat"))
    assert chat.model.config.vision is not None and chat.vision is not None


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
