"""A picture from the processor through the model and its exported directory, as a user has it."""

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.pictures import blocks, vision_directory
from support.tiny_vision import CONFIG

import erniekit
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.vision.processor import Processor, load_processor
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights

QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": blocks(84, 56, seed=1)},
            {"type": "video", "video": np.stack([blocks(56, 56, seed) for seed in range(4)])},
            {"type": "text", "text": "What is this?"},
        ],
    }
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with tokenizer, processor files and random weights of patches of 14 x 14 pixels."""
    path = vision_directory(tmp_path_factory.mktemp("use") / "vl")
    tokenizer = load_tokenizer(path)
    names = {
        f"{kind.lower()}_{which.lower()}_token_id": f"<|{kind}_{which}|>"
        for kind in ("IMAGE", "VIDEO")
        for which in ("START", "END")
    }
    names |= {f"{kind.lower()}_token_id": f"<|{kind}_PLACEHOLDER|>" for kind in ("IMAGE", "VIDEO")}
    ids: dict[str, Any] = {key: tokenizer.token_id(token) for key, token in names.items()}
    text = CONFIG["text_config"] | {"vocab_size": 576}
    vision = CONFIG["vision_config"] | {"patch_size": 14}
    model = CausalLM(ModelConfig.from_dict(CONFIG | ids | {"text_config": text, "vision_config": vision}))
    init_weights(model, 3)
    erniekit.save_model(model, path)
    return path


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return load_processor(directory)


def test_what_the_processor_gives_is_what_the_model_takes(directory: Path, processor: Processor) -> None:
    arrays = processor(QUESTION, add_generation_prompt=True)
    model = erniekit.load_model(directory)
    with paddle.no_grad():
        logits = model(**arrays).numpy()
        without_positions = model(**{key: value for key, value in arrays.items() if key != "position_ids"}).numpy()
    assert logits.shape == (1, arrays["input_ids"].shape[1], 576)
    np.testing.assert_array_equal(logits, without_positions)
    answer = model.generate(**arrays, max_new_tokens=3, eos_token_id=[]).numpy()
    assert answer.shape[1] == arrays["input_ids"].shape[1] + 3
    assert answer[0, -3] == logits[0, -1].argmax()


@pytest.mark.parametrize("weights_format", ["pt", "paddle"])
def test_an_exported_directory_gives_the_same_on_a_picture_row(
    directory: Path, processor: Processor, weights_format: str, tmp_path: Path
) -> None:
    arrays = processor(QUESTION)
    model = erniekit.load_model(directory)
    erniekit.save_model(model, tmp_path, format=weights_format)
    with paddle.no_grad():
        expected, found = (each(**arrays).numpy() for each in (model, erniekit.load_model(tmp_path)))
    np.testing.assert_array_equal(found, expected)


def test_a_longer_position_rule_is_chosen_by_name(directory: Path, processor: Processor) -> None:
    """Both rules agree on short clips, and the processor's positions are the model's."""
    arrays = processor(QUESTION, position_rule="transformers")
    model = erniekit.load_model(directory)
    given = {key: value for key, value in arrays.items() if key != "position_ids"}
    with paddle.no_grad():
        np.testing.assert_array_equal(model(**arrays).numpy(), model(**given, position_rule="transformers").numpy())
