"""What a zoom cuts out, and which pictures a search finds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import blocks, write_picture

from erniekit.tools.image_search import ImageSearch, features, similarities
from erniekit.tools.image_tools import crop_of, enlarged

PIXELS = np.arange(20 * 10 * 3, dtype=np.uint8).reshape(10, 20, 3)  # 20 wide, 10 high


@pytest.mark.parametrize(
    ("box", "columns", "rows"),
    [
        ([0, 0, 1000, 1000], slice(0, 20), slice(0, 10)),
        ([250, 500, 500, 1000], slice(5, 10), slice(5, 10)),
        ([260.5, 510, 490, 990], slice(5, 10), slice(5, 10)),  # whatever it touches
        ([999, 999, 1000, 1000], slice(19, 20), slice(9, 10)),
        ([0, 0, 1, 1], slice(0, 1), slice(0, 1)),
    ],
)
def test_a_crop_covers_the_box(box: list[float], columns: slice, rows: slice):
    np.testing.assert_array_equal(crop_of(PIXELS, box), PIXELS[rows, columns])


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((20, 10), 800, (40, 20)),
        ((20, 10), 200, (20, 10)),
        ((20, 10), 100, (20, 10)),
        ((20, 10), 10**6, (160, 80)),  # at most eightfold
    ],
)
def test_small_crops_are_enlarged(size: tuple[int, int], area: int, expected: tuple[int, int]):
    width, height = size
    assert enlarged(blocks(width, height), area).shape == (expected[1], expected[0], 3)


def test_similarity_by_hand():
    """White and black share no colour and differ by all there is; half of a picture changed leaves half of both."""
    white, black = np.full((32, 32, 3), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)
    half = np.concatenate([white[:16], black[:16]])
    others = np.stack([features(each) for each in (white, half, black)])
    np.testing.assert_allclose(similarities(features(white), others), [1, 0.5, 0], atol=1e-6)


def test_a_search_finds_the_same_picture_in_another_size(tmp_path: Path):
    for number in range(5):
        write_picture(tmp_path / "below" / f"{number}.png", 84, 56, seed=number)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    large = np.asarray(Image.fromarray(blocks(84, 56, seed=3)).resize((168, 112), Image.Resampling.NEAREST))
    hits = ImageSearch(tmp_path).find(large, count=2)
    assert hits[0].name == "below/3.png"
    assert hits[0].similarity > 0.97 > hits[1].similarity
    np.testing.assert_array_equal(hits[0].pixels, blocks(84, 56, seed=3))
