"""Greedy generation behind images and videos is what the model says without a cache, also in pieces and in batches."""

import numpy as np
import paddle
import pytest
from support.tiny_vision import CONFIG, IMAGE, START, VIDEO

from erniekit.generation import generate
from erniekit.generation.steppers import CachedStepper
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.utils.errors import UserError

RNG = np.random.default_rng(3)
IMAGES, VIDEOS = np.array([[1, 4, 4]]), np.array([[8, 2, 4]])
# The video has more time steps than rows and columns: the answer continues behind its last step.
PROMPT = [5, 6, START, *[IMAGE] * 4, START + 1, 7, START + 2, *[VIDEO] * 8, START + 3]
PICTURES = {
    "pixel_values": RNG.normal(size=(16, 12)).astype(np.float32),
    "image_grid_thw": IMAGES,
    "pixel_values_videos": RNG.normal(size=(64, 12)).astype(np.float32),
    "video_grid_thw": VIDEOS,
}


@pytest.fixture(scope="module")
def model() -> CausalLM:
    text = CONFIG["text_config"] | {"initializer_range": 0.3}
    model = CausalLM(ModelConfig.from_dict(CONFIG | {"text_config": text}))
    init_weights(model, 9)
    model.eval()
    return model


def without_cache(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token of the whole row, again and again; answers are text for positions and experts alike."""
    ids = list(prompt)
    for _ in range(count):
        row = np.array([ids])
        in_prompt = np.arange(len(ids)) < len(prompt)
        kinds = np.where(in_prompt, np.where(row == IMAGE, 1, np.where(row == VIDEO, 2, 0)), 0)
        experts = np.where(in_prompt, (row >= IMAGE).astype(int), 0)
        with paddle.no_grad():
            logits = model(row, mm_token_type_ids=kinds, moe_mm_token_type_ids=experts, **PICTURES)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("piece", [2048, 7])
def test_the_cache_changes_nothing(model: CausalLM, piece: int, monkeypatch):
    """In pieces of 7 tokens the prompt is cut within the image and within the video."""
    monkeypatch.setattr(CachedStepper, "piece_tokens", piece)
    expected = without_cache(model, PROMPT, 6)
    assert len(set(expected)) > 1
    result = generate.generate(model, [PROMPT], max_new_tokens=6, eos_token_id=[], **PICTURES)
    assert result.numpy()[0, len(PROMPT) :].tolist() == expected


def test_rows_with_and_without_pictures_share_a_batch(model: CausalLM):
    text = [9, 10, 11]
    alone = generate.generate(model, [text], max_new_tokens=4, eos_token_id=[]).numpy()[0, 3:]
    result = generate.generate(model, [text, PROMPT], max_new_tokens=4, eos_token_id=[], **PICTURES).numpy()
    np.testing.assert_array_equal(result[0, len(PROMPT) :], alone)
    assert result[1, len(PROMPT) :].tolist() == without_cache(model, PROMPT, 4)


def test_without_the_cache_pictures_are_refused(model: CausalLM):
    with pytest.raises(UserError, match="use_cache: images and videos need the cache"):
        generate.generate(model, [PROMPT], max_new_tokens=1, use_cache=False, **PICTURES)
