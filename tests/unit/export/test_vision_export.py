"""A vision-language model keeps its processor, tokenizer and chat template wherever it is written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from support.pictures import blocks
from support.tiny_directories import model_directory
from support.vision_directories import vision_model_directory

import erniekit
from erniekit import lora
from erniekit.build import load_model, our_shapes
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.data.vision.processor_files import FILES, ProcessorSettings
from erniekit.export.convert import convert
from erniekit.export.export import export_checkpoint
from erniekit.export.split import split_checkpoint

QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": blocks(84, 56, seed=1)}, {"type": "text", "text": "What?"}]}
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=84 * 84)


def logits(directory: Path) -> np.ndarray:
    arrays = erniekit.load_processor(directory)(QUESTION)
    with paddle.no_grad():
        return load_model(directory)(**arrays).numpy()


def same(one: ProcessorSettings, other: ProcessorSettings) -> bool:
    return all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items())


def as_saved(source: Path, target: Path) -> None:
    erniekit.save_model(load_model(source), target)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "export-pt": lambda source, target: export_checkpoint(source, target),
    "export-paddle": lambda source, target: export_checkpoint(source, target, format="paddle"),
    "convert": lambda source, target: convert(source, target, "paddle"),
    "split": lambda source, target: split_checkpoint(source, target, max_shard_size="10KB"),
    "save_model": as_saved,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_a_model_with_its_processor(directory: Path, tmp_path: Path, way: str):
    target = tmp_path / "written"
    WAYS[way](directory, target)
    before, after = erniekit.load_processor(directory), erniekit.load_processor(target)
    assert same(after.settings, before.settings)
    assert after.settings.images.max_pixels == 84 * 84
    respelt = before.template.source
    if way == "export-pt":
        respelt = respelt.replace("image@placeholder", "IMAGE_PLACEHOLDER")
        respelt = respelt.replace("video@placeholder", "VIDEO_PLACEHOLDER")
    assert after.template.source == respelt
    expected, found = before(QUESTION, add_generation_prompt=True), after(QUESTION, add_generation_prompt=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(logits(target), logits(directory))


@pytest.mark.parametrize("way", ["export-pt", "export-paddle", "convert", "save_model"])
def test_files_are_those_that_transformers_and_baidu_s_code_read(directory: Path, tmp_path: Path, way: str):
    """The source names its limits in transformers' way alone."""
    target = tmp_path / "written"
    WAYS[way](directory, target)
    assert {name for name in FILES if (target / name).exists()} == set(FILES)
    image = json.loads((target / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert image["size"]["longest_edge"] == image["max_pixels"] == 84 * 84


def test_a_chat_template_for_pictures_is_exported(directory: Path, tmp_path: Path):
    export_checkpoint(directory, tmp_path / "own")
    export_checkpoint(directory, tmp_path / "thinking", chat_template="vl_thinking")
    texts = [(tmp_path / name / "chat_template.jinja").read_text(encoding="utf-8") for name in ("own", "thinking")]
    assert "IMAGE_START" in texts[0]
    assert erniekit.load_processor(tmp_path / "thinking").template.source == texts[1] != texts[0]


def test_the_layout_of_transformers_names_the_tokens_of_pictures(directory: Path, tmp_path: Path):
    for format in ("pt", "paddle"):
        export_checkpoint(directory, tmp_path / format, format=format)
    settings = [
        json.loads((tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8")) for name in ("pt", "paddle")
    ]
    assert settings[0]["extra_special_tokens"]["image_token"] == "<|IMAGE_PLACEHOLDER|>"
    assert settings[0]["extra_special_tokens"]["video_end_token"] == "<|VIDEO_END|>"
    assert "extra_special_tokens" not in settings[1]


def test_a_merged_adapter_has_the_settings_it_was_trained_with(directory: Path, tmp_path: Path):
    model = load_model(directory)
    lora.attach(model, lora.LoraOptions(rank=2, alpha=4.0, seed=5), our_shapes(model.config), True)
    for name, parameter in model.named_parameters():
        if ".adapter.B" in name:
            parameter.set_value(parameter + 0.2)
    save_adapter(model, tmp_path / "adapter")
    export_checkpoint(directory, tmp_path / "base settings", adapter_dir=tmp_path / "adapter")
    assert erniekit.load_processor(tmp_path / "base settings").settings.images.max_pixels == 84 * 84
    assert not np.array_equal(logits(tmp_path / "base settings"), logits(directory))
    trained = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    (tmp_path / "adapter" / "preprocessor_config.json").write_text(json.dumps(trained), encoding="utf-8")
    export_checkpoint(directory, tmp_path / "own settings", adapter_dir=tmp_path / "adapter")
    assert erniekit.load_processor(tmp_path / "own settings").settings.images.max_pixels == 56 * 56


def test_a_model_that_was_never_in_a_directory_gets_the_published_settings(directory: Path, tmp_path: Path):
    model = load_model(directory)
    model.directory = None
    erniekit.save_model(model, tmp_path / "written")
    image = json.loads((tmp_path / "written" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert (image["patch_size"], image["max_pixels"]) == (14, 28 * 28 * 6177)


def test_files_that_are_there_are_kept(directory: Path, tmp_path: Path):
    target = tmp_path / "written"
    target.mkdir()
    (target / "preprocessor_config.json").write_text('{"max_pixels": 3136}', encoding="utf-8")
    erniekit.save_model(load_model(directory), target)
    assert erniekit.load_processor(target).settings.images.max_pixels == 3136


def test_a_text_model_has_none(tmp_path: Path):
    source = model_directory(tmp_path / "text")
    for way, write in WAYS.items():
        write(source, tmp_path / way)
        assert not any((tmp_path / way / name).exists() for name in FILES)
        assert (tmp_path / way / "tokenizer.json").exists()
