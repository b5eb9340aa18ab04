"""Pictures: bytes -> uint8 pixels -> patches, with the arithmetic of ERNIE 4.5's training code (Pillow, bicubic).

Transparent pixels become white, 16-bit grey is divided by 256, an orientation tag is ignored unless asked for. The
model normalises uint8 patches itself (pixels.py).
"""

import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.media import MediaReader, describe
from erniekit.data.vision.smart_resize import PUBLISHED, Geometry, Patching

# Formats whose decoders are part of Pillow's wheel and start no other program (EPS would).
_WANTED = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # Pillow may be built without some of them
_VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v")  # what is most often meant by them
_ORIENTATION = 0x0112
_SIDES = (0x0100, 0x0101)  # width and height of what a TIFF file holds
_TURNS = range(2, 9)  # its values that turn or mirror a picture; 1 is upright, others mean nothing
# Programs that draw pictures keep their settings as text in PNG files. Pillow refuses the picture because of a text
# beyond 1 MB; its bound for all texts of a file, 64 MB, remains.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class ImageOptions:
    """How pictures are decoded. More than `max_pixels_decoded` are refused before anything is decoded; decoding that
    takes longer than `max_seconds` ends. `apply_exif` turns a picture as its orientation tag says.
    """

    apply_exif: bool = False
    max_pixels_decoded: int = 89_478_485  # 256 MB of RGB; Pillow's own bound
    max_seconds: float = 30.0


IMAGE_OPTIONS = ImageOptions()


def image_size(source: Any, reader: MediaReader, options: ImageOptions = IMAGE_OPTIONS) -> tuple[int, int]:
    """(width, height) of a picture as `load_image` would return it, from its header alone."""
    if isinstance(source, np.ndarray):
        return check_array(source).shape[1], source.shape[0]
    with _opened(source, reader, options) as image:
        width, height = image.size
        if image.format == "TIFF":  # of such files some versions of Pillow say the turned size here, others the stored
            width, height = (image.tag_v2[tag] for tag in _SIDES)  # type: ignore[attr-defined]
        is_turned = options.apply_exif or image.format == "TIFF"
        return (height, width) if is_turned and _orientation(image, None) in (5, 6, 7, 8) else (width, height)


def load_image(
    source: Any, reader: MediaReader, options: ImageOptions = IMAGE_OPTIONS, notes: Notes | None = None
) -> np.ndarray:
    """The pixels of a picture, uint8 [height, width, 3]; see load_picture."""
    if isinstance(source, np.ndarray):
        return check_array(source)
    return np.asarray(load_picture(source, reader, options, notes))


def load_picture(
    source: Any, reader: MediaReader, options: ImageOptions = IMAGE_OPTIONS, notes: Notes | None = None
) -> Image.Image:
    """A decoded picture in RGB. `source`: see MediaReader, or a PIL image, or an array uint8 [height, width, 3].

    BadRecord for what cannot be decoded; to `notes` is added what was decided: an ignored orientation tag, frames or
    pages after the first.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(check_array(source))
    with _opened(source, reader, options) as image:
        if _count_frames(image) > 1 and notes is not None:
            notes.doubts.add("a picture of several frames or pages: only the first one is used")
        if image.format != "TIFF" and _orientation(image, notes) in _TURNS:  # Pillow itself turns what TIFF files hold
            if options.apply_exif:
                image = ImageOps.exif_transpose(image)
            elif notes is not None:
                notes.doubts.add(
                    "a picture has an orientation tag, which is ignored as in ERNIE's training code "
                    "(apply_exif: true turns the picture)"
                )
        picture = to_rgb(image, describe(source))
        picture.load()  # before its file is closed
        return picture


def _orientation(image: Image.Image, notes: Notes | None) -> Any:
    """The orientation tag of a picture; 1, upright, where there is none or it cannot be read. What a camera or a
    program wrote beside the pixels does not make a picture unreadable.
    """
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (TimeoutError, MemoryError):
        raise
    except Exception:  # Pillow raises many kinds for damaged EXIF and XMP data, others in each version
        if notes is not None:
            notes.doubts.add("the EXIF data of a picture cannot be read: it is taken as upright")
        return 1


def _count_frames(image: Image.Image) -> int:
    """Frames of an animation, or pages; 1 for other pictures, whose classes do not know the word, and for the photos of
    cameras (MPO), which keep a preview or a map of brightness behind the picture.
    """
    if image.format == "MPO":
        return 1
    try:
        return image.n_frames  # type: ignore[attr-defined]
    except AttributeError:
        return 1


def check_array(pixels: np.ndarray) -> np.ndarray:
    """Pixels that came as an array: uint8 [height, width, 3]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise BadRecord(
            f"an array of {pixels.dtype} {list(pixels.shape)} is no picture", "give uint8 [height, width, 3] in RGB"
        )
    return pixels


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image of any mode in RGB: white where it is transparent, 16-bit grey divided by 256. `name`: for messages."""
    if image.mode in _GREY_16:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadRecord(
                f"{name} has grey values from {grey.min()} to {grey.max()}, and 16 bits are from 0 to 65535",
                "save it with 8 bits a channel",
            )
        narrow = (grey // 256).astype(np.uint8)
        narrow[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(narrow).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(source: Any, reader: MediaReader, options: ImageOptions) -> Iterator[Image.Image]:
    """A picture whose header was read and is allowed. Whatever decoding raises becomes a BadRecord."""
    name = describe(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warning of large pictures: the bound below is ours
        try:
            if isinstance(source, Image.Image):
                _check_header(source, options, name)
                yield source.copy()
                return
            with reader.open(source) as file:
                timed: Any = _Timed(file, options.max_seconds)  # it has all that Pillow calls of a file
                with Image.open(timed, formats=FORMATS) as image:
                    _check_header(image, options, name)
                    yield image
        except UnidentifiedImageError:
            hint = f"the formats are {', '.join(FORMATS)}"
            if name.lower().endswith(_VIDEOS):
                hint = "a video stands among the videos of a record, and its tag is <video>"
            raise BadRecord(f"{name} is not a picture of a known format", hint) from None
        except Image.DecompressionBombError as error:
            hint = "make the picture smaller: this is Pillow's own limit, whatever max_decoded_pixels says"
            raise BadRecord(f"{name} is too large to be decoded: {error}", hint) from None
        except TimeoutError:
            raise BadRecord(
                f"decoding {name} takes longer than {options.max_seconds:g} seconds", "save it again, or remove the row"
            ) from None
        except (BadRecord, MemoryError):
            raise
        except Exception as error:  # each decoder raises its own kinds for a damaged file
            raise BadRecord(f"{name} cannot be decoded: {error}", "is the file complete?") from None


def _check_header(image: Image.Image, options: ImageOptions, name: str) -> None:
    if image.mode == "F":
        raise BadRecord(
            f"{name} has floating-point values, whose brightness is not defined", "save it with 8 bits a channel"
        )
    width, height = image.size
    if width * height > options.max_pixels_decoded:
        raise BadRecord(
            f"{name} has {width} x {height} pixels, more than the {options.max_pixels_decoded:,} that are decoded",
            "make the picture smaller, or raise max_decoded_pixels",
        )


class _Timed(io.BufferedIOBase):
    """A file whose reads fail after a number of seconds, which ends a decoder that reads on and on."""

    def __init__(self, file: BinaryIO, seconds: float):
        self._file, self._end = file, time.monotonic() + seconds

    def read(self, size: int | None = -1) -> bytes:
        if time.monotonic() > self._end:
            raise TimeoutError
        return self._file.read(-1 if size is None else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def resize(picture: Image.Image | np.ndarray, geometry: Geometry) -> np.ndarray:
    """A picture in RGB, or its pixels uint8 [H, W, 3], as pixels at the size of a geometry, by Pillow's bicubic
    filter.
    """
    size = (geometry.width, geometry.height)
    if isinstance(picture, np.ndarray):
        if (picture.shape[1], picture.shape[0]) == size:
            return picture
        picture = Image.fromarray(picture)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, patching: Patching = PUBLISHED) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] as patches [P, 3 * patch * patch]: frame by frame; within a frame block by block of the
    patches that become one token; within a patch channel, row, column.
    """
    count, height, width, channels = frames.shape
    side, merge = patching.patch, patching.spatial_merge
    rows, columns = height // side, width // side
    blocks = frames.reshape(count, rows // merge, merge, side, columns // merge, merge, side, channels)
    ordered = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return np.ascontiguousarray(ordered).reshape(count * rows * columns, channels * side * side)
