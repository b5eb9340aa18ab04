"""Sizes, grids and token counts, with the numbers that the training code and transformers give for them."""

import numpy as np
import pytest

from erniekit.data.vision.positions import num_tokens
from erniekit.data.vision.smart_resize import (
    IMAGE_LIMITS,
    TOKEN_AREA,
    VIDEO_LIMITS,
    Patching,
    PixelLimits,
    measure,
    smart_resize,
)
from erniekit.utils.errors import DataError

TRAINING = PixelLimits(4 * TOKEN_AREA, 16384 * TOKEN_AREA)


# width, height -> rows and columns of patches
@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [
        (28, 28, 4, 4),
        (29, 57, 6, 4),
        (300, 40, 2, 22),
        (1000, 700, 50, 72),
        (1, 1, 4, 4),
        (14, 42, 8, 4),
        (64, 48, 4, 4),
    ],
)
def test_published_grids(width, height, rows, columns):
    assert measure(width, height).grid == (1, rows, columns)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"), [(64, 48, 30, 40), (96, 64, 30, 44), (56, 56, 36, 36), (1920, 1080, 50, 92)]
)
def test_published_grids_of_frames(width, height, rows, columns):
    assert measure(width, height, frames=4).grid == (4, rows, columns)


def test_tokens_of_large_pictures():
    assert measure(1920, 1080).tokens == 2691
    assert measure(4032, 3024).tokens == 6120
    assert measure(4032, 3024, limits=TRAINING).tokens == 15552


def test_odd_number_of_frames_repeats_the_last():
    assert measure(64, 48, frames=5).grid[0] == 6
    assert measure(64, 48, frames=1).grid[0] == 2
    assert measure(64, 48, frames=5).tokens == 6 * 30 * 40 // 8
    assert measure(64, 48, frames=6).tokens == measure(64, 48, frames=5).tokens


def test_sides_are_rounded_half_to_even():
    assert smart_resize(42, 280, IMAGE_LIMITS) == (56, 280)  # 1.5 -> 2
    assert smart_resize(70, 280, IMAGE_LIMITS) == (56, 280)  # 2.5 -> 2


def test_no_side_is_rounded_away():
    assert smart_resize(1000, 10, IMAGE_LIMITS) == (1008, 28)
    assert measure(1000, 10).tokens == 36


def test_very_long_pictures_are_shortened():
    assert smart_resize(2010, 10, IMAGE_LIMITS) == (5600, 28)
    assert smart_resize(10, 2010, IMAGE_LIMITS) == (28, 5600)
    assert smart_resize(30, 9000, IMAGE_LIMITS) == (28, 5600)


def test_area_stays_within_the_limits():
    for width, height in [(13, 5000), (4000, 3000), (777, 333), (5, 5), (28, 5600)]:
        for limits in (IMAGE_LIMITS, VIDEO_LIMITS, TRAINING):
            new_width, new_height = smart_resize(width, height, limits)
            assert limits.min_pixels <= new_width * new_height <= limits.max_pixels
            assert new_width % 28 == 0 and new_height % 28 == 0


def test_a_shape_that_fits_no_limit_names_the_limit_that_would():
    with pytest.raises(DataError, match=r"5600 x 28.*max_pixels 3136: the smallest max_pixels .* is 155232"):
        measure(5600, 28, limits=PixelLimits(TOKEN_AREA, 4 * TOKEN_AREA))
    assert measure(5600, 28, limits=PixelLimits(TOKEN_AREA, 155232)).tokens == 198
    with pytest.raises(DataError, match="the smallest max_pixels for its shape is 6272"):
        measure(30, 80, limits=PixelLimits(3136, 4000))  # enlarged to min_pixels it is larger than max_pixels
    assert measure(30, 80, limits=PixelLimits(3136, 6272)).grid == (1, 8, 4)
    with pytest.raises(DataError, match="min_pixels to at most 2352"):
        measure(100, 33, limits=PixelLimits(3000, 3100))


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_pictures_without_area_are_refused(size):
    with pytest.raises(DataError, match="no area"):
        measure(*size)
    with pytest.raises(DataError, match="at least one"):
        measure(10, 10, frames=0)


def test_other_patches():
    geometry = measure(160, 96, limits=PixelLimits(1, 10**6), patching=Patching(patch=16, spatial_merge=1))
    assert geometry.grid == (1, 6, 10) and geometry.tokens == geometry.patches == 60


def test_tokens_are_those_that_the_model_makes_of_the_grid():
    """Counting before anything is decoded and the model's placeholders follow from one function."""
    for width, height, frames in [(640, 480, None), (33, 900, None), (320, 200, 7), (320, 200, 1), (64, 64, 16)]:
        geometry = measure(width, height, frames)
        assert geometry.tokens == num_tokens(np.array([geometry.grid]))[0]
    with pytest.raises(DataError, match="at least one"):
        measure(64, 64, 0)
