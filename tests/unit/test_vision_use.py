"""A picture from the processor through the model and its exported directory, as a user has it."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from support.pictures import blocks
from support.tiny_directories import VOCAB_SIZE
from support.vision_directories import vision_model_directory

import erniekit
from erniekit.data.vision.processor import Processor, load_processor

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
    return vision_model_directory(tmp_path_factory.mktemp("use") / "vl", weights=True, max_pixels=84 * 84)


@pytest.fixture(scope="module")
def processor(directory: Path) -> Processor:
    return load_processor(directory)


def test_what_the_processor_gives_is_what_the_model_takes(directory: Path, processor: Processor) -> None:
    arrays = processor(QUESTION, add_generation_prompt=True)
    model = erniekit.load_model(directory)
    with paddle.no_grad():
        logits = model(**arrays).numpy()
        without_positions = model(**{key: value for key, value in arrays.items() if key != "position_ids"}).numpy()
    assert logits.shape == (1, arrays["input_ids"].shape[1], VOCAB_SIZE)
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
