"""The public call of a vision-language model: what it refuses, and what a row is by itself."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG, IMAGE, PATCH, START, VIDEO

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.pictures import PictureArguments, picture_tables, rows_of
from erniekit.nn.roles import Component, Role, named_components, named_roles

# Text, an image of two tokens with its start and end token, text.
IDS = np.array([[7, 8, START, IMAGE, IMAGE, START + 1, 9, 10]])
GRID = np.array([[1, 2, 4]])
PIXELS = np.random.default_rng(0).normal(size=(8, PATCH)).astype(np.float32)
ZERO = np.zeros_like(IDS)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    init_weights(model, 5)
    model.eval()
    return model


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pixel_values": PIXELS}, "image_grid_thw is missing"),
        ({"image_grid_thw": GRID}, "pixel_values is missing"),
        ({"pixel_values": PIXELS[:7], "image_grid_thw": GRID}, "7 patches, but image_grid_thw says 8"),
        ({"pixel_values": PIXELS[:, :5], "image_grid_thw": GRID}, r"expected \[patches, 12\].*got \[8, 5\]"),
        ({"pixel_values": PIXELS, "image_grid_thw": GRID[0]}, r"image_grid_thw: expected integers of shape \[N, 3\]"),
        ({"pixel_values": PIXELS, "image_grid_thw": np.array([[1, 8, 1]])}, "multiples of 2"),
        ({"pixel_values": PIXELS[:4], "image_grid_thw": np.array([[1, 2, 2]])}, "2 placeholders of images"),
        ({"pixel_values_videos": PIXELS, "video_grid_thw": np.array([[2, 2, 2]])}, "2 placeholders of images"),
        ({"pixel_values": PIXELS, "image_grid_thw": GRID, "moe_mm_token_type_ids": ZERO}, "all zero.*text experts"),
        (
            {"pixel_values": PIXELS, "image_grid_thw": GRID, "mm_token_type_ids": ZERO[:, 1:]},
            "mm_token_type_ids: shape",
        ),
        ({"segment_ids": ZERO + 1, "attention_mask": ZERO + 1}, "segment_ids and attention_mask: give one"),
        ({"pixel_values": PIXELS, "image_grid_thw": GRID, "position_rule": "mrope"}, "position_rule: expected one of"),
    ],
)
def test_what_does_not_belong_together_is_refused(model: CausalLM, arguments, words):
    with pytest.raises(ValueError, match=words):
        model(IDS, **arguments)


def test_a_model_of_text_alone_takes_no_pictures():
    with pytest.raises(ValueError, match="pixel_values: this is a model of text alone"):
        tiny_model("moe")(np.array([[5, 6]]), pixel_values=PIXELS, image_grid_thw=GRID)


def test_uint8_pixels_and_tensors_are_taken_too(model: CausalLM):
    from erniekit.data.vision.pixels import MEAN, STD

    raw = np.random.default_rng(1).integers(0, 256, (8, PATCH)).astype(np.uint8)
    mean, std = (np.repeat(np.array(each), 4) for each in (MEAN, STD))
    ready = paddle.to_tensor(((raw / 255.0 - mean) / std).astype(np.float32))
    with paddle.no_grad():
        first = model(paddle.to_tensor(IDS), pixel_values=raw, image_grid_thw=GRID).numpy()
        second = model(IDS, pixel_values=ready, image_grid_thw=paddle.to_tensor(GRID)).numpy()
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_text_alone_is_the_same_with_and_without_types(model: CausalLM):
    ids = np.array([[7, 8, 9]])
    with paddle.no_grad():
        plain = model(ids).numpy()
        typed = model(ids, mm_token_type_ids=np.zeros_like(ids), moe_mm_token_type_ids=np.zeros_like(ids)).numpy()
    np.testing.assert_allclose(plain, typed, rtol=0, atol=1e-6)


def test_one_placeholder_for_both_kinds():
    model = CausalLM(ModelConfig.from_dict(CONFIG | {"video_token_id": IMAGE}))
    init_weights(model, 5)
    ids = np.array([[START, IMAGE, START + 1, START + 2, IMAGE, START + 3, 7]])
    both = {
        "pixel_values": PIXELS[:4],
        "image_grid_thw": np.array([[1, 2, 2]]),
        "pixel_values_videos": PIXELS,
        "video_grid_thw": np.array([[2, 2, 2]]),
    }
    with pytest.raises(ValueError, match="mm_token_type_ids: needed"):
        model(ids, **both)
    with paddle.no_grad():
        assert model(ids, mm_token_type_ids=np.array([[0, 1, 0, 0, 2, 0, 0]]), **both).shape == [1, 7, 64]
        alone = model(ids[:, 3:], pixel_values_videos=PIXELS, video_grid_thw=np.array([[2, 2, 2]]))
    assert alone.shape == [1, 4, 64]


def test_a_row_by_itself_has_its_own_pictures(model: CausalLM):
    """The first row has no picture and is padded on the left, the second has an image and a video."""
    rows = [
        [0] * 6 + [7, 8, 9, 10],
        [5, START, IMAGE, START + 1, 6, START + 2, VIDEO, VIDEO, START + 3, 7],
    ]
    ids, real = np.array(rows), np.array(rows) != 0
    arguments = PictureArguments(PIXELS[:4], np.array([[1, 2, 2]]), np.tile(PIXELS, (2, 1)), np.array([[2, 2, 4]]))
    tables = picture_tables(model.config, ids, real.astype(np.int64), arguments)
    assert tables is not None
    text, media = rows_of(tables, real, 2)
    assert not len(text.grid) and text.positions[:, 0].tolist() == [0, 1, 2, 3]
    assert media.grid.tolist() == [[1, 2, 2], [2, 2, 4]] and media.places.tolist() == [2, 6, 7]
    assert media.modality.tolist() == [0, 1, 1, 1, 0, 1, 2, 2, 1, 0]
    assert len(media.patches) == 20


def test_every_parameter_has_a_component_and_a_role(model: CausalLM):
    components, roles = named_components(model), named_roles(model)
    assert components["model.vision_model.blocks.0.attn.qkv.weight"] is Component.VISION_TRANSFORMER
    assert components["model.resampler_model.after_norm.weight"] is Component.RESAMPLER
    assert components["model.layers.1.mlp.gate.weight_1"] is Component.VISION_EXPERTS
    assert components["model.layers.1.mlp.vision_experts.down_proj.weight"] is Component.VISION_EXPERTS
    for name in ("embed_tokens.weight", "layers.1.mlp.gate.weight", "layers.1.mlp.shared_experts.down_proj.weight"):
        assert components[f"model.{name}"] is Component.LANGUAGE
    assert roles["model.vision_model.ln.weight"] is Role.NORM and roles["model.vision_model.ln.bias"] is Role.BIAS
    assert roles["model.layers.1.mlp.gate.weight_1"] is Role.ROUTER
    assert components.keys() <= roles.keys()
    assert all(component is Component.LANGUAGE for component in named_components(tiny_model("moe")).values())
