"""Pictures of every kind as pixels and patches; broken ones as bad rows."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import blocks, encoded

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.images import (
    ImageOptions,
    image_size,
    load_image,
    patchify,
    resize,
)
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.pixels import MEAN, STD, normalise
from erniekit.data.vision.smart_resize import measure

RED, WHITE = [255, 0, 0], [255, 255, 255]


@pytest.fixture
def reader(tmp_path):
    return MediaReader(tmp_path)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(reader, form):
    pixels = blocks(33, 21)
    source = encoded(pixels, form, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(load_image(source, reader), pixels)
    assert image_size(source, reader) == (33, 21)


def test_the_name_of_a_file_says_nothing(reader, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(blocks(30, 20)))
    np.testing.assert_array_equal(load_image("photo.jpg", reader), blocks(30, 20))


def test_arrays_and_images(reader):
    pixels = blocks(30, 20)
    np.testing.assert_array_equal(load_image(pixels, reader), pixels)
    np.testing.assert_array_equal(load_image(Image.fromarray(pixels), reader), pixels)
    assert image_size(pixels, reader) == image_size(Image.fromarray(pixels), reader) == (30, 20)
    with pytest.raises(BadRecord, match="float64"):
        load_image(pixels / 255, reader)


def test_transparency_becomes_white(reader):
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (255, 0, 0, 0))
    assert load_image(saved(half), reader)[0].tolist() == [RED, WHITE]
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert load_image(saved(grey), reader)[0].tolist() == [[0, 0, 0], WHITE]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert load_image(saved(palette, transparency=1), reader)[0].tolist() == [RED, WHITE]


def test_16_bit_grey_is_divided(reader):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert load_image(saved(Image.fromarray(values)), reader)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_16_bit_grey_may_be_transparent(reader):
    values = np.array([[512, 32768]], np.uint16)
    assert load_image(saved(Image.fromarray(values), transparency=512), reader)[0, :, 0].tolist() == [255, 128]


def _png_with(name: bytes, content: bytes) -> bytes:
    """A PNG file with another chunk behind its header."""
    whole = encoded(blocks(30, 20))
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return whole[:33] + chunk + whole[33:]


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(apply_exif=True)])
@pytest.mark.parametrize(
    ("name", "content", "doubt"),
    [
        (b"eXIf", b"no EXIF data", True),
        (b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * (2 << 20)), False),
    ],
)
def test_what_stands_beside_the_pixels_does_not_make_a_picture_unreadable(reader, options, name, content, doubt):
    notes, source = Notes(), _png_with(name, content)
    assert image_size(source, reader, options) == (30, 20)
    np.testing.assert_array_equal(load_image(source, reader, options, notes), blocks(30, 20))
    assert any("EXIF data of a picture cannot be read" in said for said in notes.doubts) == doubt


def test_an_orientation_that_turns_nothing_is_no_warning(reader):
    exif = Image.Exif()
    exif[0x0112] = 0  # some cameras write it where they do not know
    notes = Notes()
    load_image(saved(Image.fromarray(blocks(30, 20)), "PNG", exif=exif), reader, notes=notes)
    assert not notes.doubts


def test_cmyk_grey_and_black_and_white(reader):
    assert load_image(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), reader)[0, 0].tolist() == RED
    assert load_image(saved(Image.new("L", (2, 2), 7)), reader)[0, 0].tolist() == [7, 7, 7]
    assert load_image(saved(Image.new("1", (2, 2), 1)), reader)[0, 0].tolist() == WHITE


def test_of_an_animation_the_first_frame(reader):
    frames = [Image.fromarray(blocks(20, 20, seed)) for seed in range(3)]
    source = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    notes = Notes()
    np.testing.assert_array_equal(load_image(source, reader, notes=notes), blocks(20, 20, 0))
    assert any("only the first one" in doubt for doubt in notes.doubts)


def test_orientation_is_ignored_unless_asked_for(reader):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = blocks(30, 20)
    source = saved(Image.fromarray(pixels), "PNG", exif=exif)
    notes = Notes()
    np.testing.assert_array_equal(load_image(source, reader, notes=notes), pixels)
    assert image_size(source, reader) == (30, 20)
    assert any("orientation" in doubt for doubt in notes.doubts)
    turned = ImageOptions(apply_exif=True)
    np.testing.assert_array_equal(load_image(source, reader, turned), np.rot90(pixels, -1))
    assert image_size(source, reader, turned) == (20, 30)


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(apply_exif=True)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_file_is_turned_and_its_header_says_the_turned_size(reader, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source, notes = saved(Image.fromarray(blocks(30, 20)), "TIFF", exif=exif), Notes()
    expected = np.rot90(blocks(30, 20), {1: 0, 3: 2, 6: -1}[orientation])
    np.testing.assert_array_equal(load_image(source, reader, options, notes), expected)
    assert image_size(source, reader, options) == expected.shape[1::-1]
    assert not notes.doubts


def test_broken_files_are_bad_rows(reader):
    whole = encoded(blocks(300, 200))
    for source, message in [
        (b"not a picture at all", "is not a picture of a known format"),
        (whole[: len(whole) // 2], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not a picture of a known format"),
        (whole[:20], "cannot be decoded|is not a picture"),
    ]:
        with pytest.raises(BadRecord, match=message):
            load_image(source, reader)


def test_floating_point_values_are_found_in_the_header(tmp_path: Path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "depth.tif")
    for read in (image_size, load_image):
        with pytest.raises(BadRecord, match=r"depth\.tif has floating-point values"):
            read("depth.tif", MediaReader(tmp_path))


def test_grey_beyond_16_bits_is_refused(reader):
    """Cut off at 16 bits it would be white."""
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 1 << 20]], np.int32)).save(file, "TIFF")
    with pytest.raises(BadRecord, match="bytes of data has grey values from 0 to 1048576"):
        load_image(file.getvalue(), reader)


def test_the_preview_in_a_photo_of_a_camera_is_no_second_picture(reader):
    photo, preview, file = Image.new("RGB", (64, 48)), Image.new("RGB", (16, 12)), io.BytesIO()
    photo.save(file, "MPO", save_all=True, append_images=[preview])
    notes = Notes()
    assert load_image(file.getvalue(), reader, notes=notes).shape == (48, 64, 3) and not notes.doubts


def test_floating_point_pictures_are_refused(reader):
    with pytest.raises(BadRecord, match="floating-point"):
        load_image(saved(Image.new("F", (2, 2), 0.5), "TIFF"), reader)


def test_a_bomb_is_refused_by_its_header(reader):
    bomb = saved(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    for function in (image_size, load_image):
        with pytest.raises(BadRecord, match="too large") as caught:
            function(bomb, reader)
        assert "whatever max_decoded_pixels says" in caught.value.hint
    with pytest.raises(BadRecord, match=r"10000 x 10000 pixels, more than the 89,478,485") as caught:
        image_size(saved(Image.new("1", (10000, 10000))), reader)
    assert "raise max_decoded_pixels" in caught.value.hint


def test_decoding_has_a_time_limit(reader):
    with pytest.raises(BadRecord, match="longer than 0 seconds"):
        load_image(encoded(blocks(300, 200)), reader, ImageOptions(max_seconds=0))


def test_patch_order():
    """Blocks of 2 x 2 patches, within a patch channel by channel."""
    height, width = 56, 84
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = np.arange(height)[:, None]
    frame[..., 1] = np.arange(width)
    frame[..., 2] = 7
    patches = patchify(np.stack([frame, frame + 1])).reshape(2 * 24, 3, 14, 14)
    corners = [(int(patch[0, 0, 0]) // 14, int(patch[1, 0, 0]) // 14) for patch in patches[:24]]
    assert corners[:8] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert corners[12:14] == [(2, 0), (2, 1)]
    assert (patches[:24, 2] == 7).all() and (patches[24:, 2] == 8).all()
    assert (patches[0, 0] == np.arange(14)[:, None]).all() and (patches[0, 1] == np.arange(14)).all()


def test_normalised_values():
    patches = patchify(blocks(56, 56)[None])
    pixels = patches.reshape(len(patches), 3, -1).astype(np.float64)
    expected = (pixels / 255 - MEAN[:, None]) / STD[:, None]
    values = normalise(patches)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.reshape(expected.shape), expected, atol=1e-6)


def test_resizing_is_pillows_bicubic():
    pixels, geometry = blocks(300, 200), measure(300, 200)
    expected = Image.fromarray(pixels).resize((geometry.width, geometry.height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(pixels, geometry), np.asarray(expected))
    exact = blocks(56, 84)
    assert resize(exact, measure(56, 84)) is exact
