"""The vision transformer and the resampler by themselves."""

import numpy as np
import paddle
import pytest

from erniekit.data.vision.pixels import MEAN, STD
from erniekit.models.resampler import Resampler, frame_pairs
from erniekit.models.vision import QuickGELU, VisionTransformer, patch_positions
from erniekit.models.vision_config import VisionConfig
from erniekit.nn.linear import Linear
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.precision.weight_only import SCHEMES

CONFIG = VisionConfig(depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=2)
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    paddle.seed(4)
    return VisionTransformer(CONFIG, 0.3)


def pixels(num: int) -> np.ndarray:
    return RNG.integers(0, 256, (num, 12)).astype(np.uint8)


def test_patches_stand_in_blocks_that_become_one_token():
    positions = patch_positions(np.array([[1, 4, 4]]), 2)
    assert positions[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert positions[4:8].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert positions[-1].tolist() == [3, 3]
    np.testing.assert_array_equal(
        patch_positions(np.array([[2, 2, 4]]), 2)[8:], patch_positions(np.array([[1, 2, 4]]), 2)
    )


def test_pixels_are_normalised_by_channel_in_fp32(tower: VisionTransformer):
    patches = pixels(8)
    mean, std = (np.repeat(np.array(each), 4) for each in (MEAN, STD))
    normalised = ((patches / 255.0 - mean) / std).astype(np.float32)
    grid = np.array([[1, 2, 4]])
    with paddle.no_grad():
        raw = tower(paddle.to_tensor(patches), grid).numpy()
        ready = tower(paddle.to_tensor(normalised), grid).numpy()
    np.testing.assert_allclose(raw, ready, rtol=0, atol=1e-5)


def test_images_and_frames_do_not_see_one_another(tower: VisionTransformer):
    grid = np.array([[1, 4, 2], [2, 2, 4], [1, 2, 2]])
    patches = pixels(int(grid.prod(axis=1).sum()))
    with paddle.no_grad():
        together = tower(paddle.to_tensor(patches), grid).numpy()
        frames = [
            (patches[:8], [1, 4, 2]),
            (patches[8:16], [1, 2, 4]),
            (patches[16:24], [1, 2, 4]),
            (patches[24:], [1, 2, 2]),
        ]
        apart = [tower(paddle.to_tensor(part), np.array([size])).numpy() for part, size in frames]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=0, atol=1e-5)


def test_the_place_of_a_patch_matters(tower: VisionTransformer):
    """The same patches as a picture of another shape."""
    patches = paddle.to_tensor(pixels(8))
    with paddle.no_grad():
        wide, high = (tower(patches, np.array([[1, *shape]])).numpy() for shape in ((2, 4), (4, 2)))
    assert np.abs(wide - high).max() > 1e-3


def test_products_can_hold_all_weights_of_the_tower():
    """As anywhere: no layer may ask for the parameter that a product replaces."""
    tower, plain = VisionTransformer(CONFIG, 0.3), VisionTransformer(CONFIG, 0.3)
    plain.set_state_dict(tower.state_dict())
    factory = QuantizedWeights(SCHEMES["wint8"])
    projections = [[layer for layer in each.sublayers() if isinstance(layer, Linear)] for each in (tower, plain)]
    for projection, other in zip(*projections, strict=True):
        product = factory(projection)
        product.fill(0, other.weight.numpy())
        projection.attach_product(product)
        other.weight.set_value(product.dense())
    patches, grid = paddle.to_tensor(pixels(8)), np.array([[1, 2, 4]])
    with paddle.no_grad():
        np.testing.assert_allclose(tower(patches, grid).numpy(), plain(patches, grid).numpy(), rtol=0, atol=1e-5)


def test_a_video_joins_even_frames_with_the_odd_ones_behind_them():
    even, odd = frame_pairs(np.array([[1, 2, 4], [4, 2, 2]]), 2)
    assert even.tolist() == [0, 1, 2, 4] and odd.tolist() == [0, 1, 3, 5]


def test_a_still_video_is_the_image_of_its_frame():
    paddle.seed(5)
    resampler = Resampler(CONFIG, 8, 1e-5, 0.3)
    frame = RNG.normal(size=(8, 16)).astype(np.float32)
    with paddle.no_grad():
        image = resampler(paddle.to_tensor(frame), np.array([[1, 2, 4]])).numpy()
        video = resampler(paddle.to_tensor(np.tile(frame, (4, 1))), np.array([[4, 2, 4]])).numpy()
    np.testing.assert_allclose(video, np.tile(image, (2, 1)), rtol=0, atol=1e-5)


def test_depth_of_each_parameter(tower: VisionTransformer):
    depths = tower.parameter_depths()
    assert depths["patch_embed.proj.weight"] == depths["blocks.0.attn.qkv.weight"] == 0
    assert depths["blocks.1.mlp.fc2.bias"] == 1 and depths["ln.weight"] == 2


def test_quick_gelu_and_its_gradient_follow_the_formula():
    values = RNG.normal(scale=4.0, size=(50, 3)).astype(np.float32)
    results = []
    for function in (QuickGELU(), lambda x: x * paddle.nn.functional.sigmoid(1.702 * x)):
        x = paddle.to_tensor(values, stop_gradient=False)
        y = function(x)
        y.square().sum().backward()
        results.append((y.numpy(), x.grad.numpy()))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
