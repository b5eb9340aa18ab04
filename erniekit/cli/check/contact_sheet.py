"""A contact sheet: one PNG file with the pictures of some records as the model sees them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from erniekit.data.records.errors import BadRecord
from erniekit.data.vision.boxes import SCALE
from erniekit.data.vision.frames import FONT
from erniekit.data.vision.plan import MediaPlan
from erniekit.utils import atomic
from erniekit.utils.wording import count_of

MAX_TILES = 60
_SIDE = 360  # pixels of a tile's picture: larger ones are made smaller, small ones enlarged
_COLUMNS, _GAP, _LINE, _TEXT = 3, 12, 17, 13
_FRAMES = 6  # shown of a video
_CHARACTERS = 56  # of a line of text
_BACKGROUND, _INK, _BOX = (255, 255, 255), (40, 40, 40), (220, 30, 30)


class Tile(NamedTuple):
    """A picture or video to be drawn: its record's place, what decodes it, and boxes in it (0 to 1000)."""

    where: str
    plan: MediaPlan
    boxes: list[list[float]]


def write_sheet(tiles: Sequence[Tile], path: Path) -> None:
    """Draw the first MAX_TILES tiles and write them as a PNG file."""
    drawn = [draw(tile) for tile in tiles[:MAX_TILES]]
    columns = min(_COLUMNS, len(drawn))
    heights = [max(t.height for t in drawn[at : at + columns]) + _GAP for at in range(0, len(drawn), columns)]
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, sum(heights) + _GAP), _BACKGROUND)
    top = _GAP
    for row, height in enumerate(heights):
        for column, tile in enumerate(drawn[row * columns : (row + 1) * columns]):
            sheet.paste(tile, (_GAP + column * (_SIDE + _GAP), top))
        top += height
    with atomic.new_file(path) as temporary:
        sheet.save(temporary, "PNG")


def draw(tile: Tile) -> Image.Image:
    """A picture or video above its text."""
    plan = tile.plan
    try:
        picture = _picture(plan.pixels(), tile.boxes)
    except BadRecord as error:
        picture = Image.new("RGB", (_SIDE, 2 * _LINE), _BACKGROUND)
        _write(picture, [error.reason[: 2 * _CHARACTERS]], 0)
    size = plan.geometry
    frames = "" if plan.frames is None else f"{count_of(plan.frames, 'frame')} of "
    lines = [
        _end(tile.where),
        _end(plan.name),
        f"{frames}{plan.width} x {plan.height} -> {size.width} x {size.height}: {count_of(size.tokens, 'token')}",
    ]
    result = Image.new("RGB", (_SIDE, picture.height + _LINE * len(lines) + 4), _BACKGROUND)
    result.paste(picture, (0, 0))
    _write(result, lines, picture.height + 2)
    return result


def _picture(frames: np.ndarray, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """A picture with its boxes, or some frames of a video beside and below one another."""
    if len(frames) == 1:
        picture = _fitted(Image.fromarray(frames[0]), _SIDE)
        draw = ImageDraw.Draw(picture)
        for left, top, right, bottom in boxes:
            corners = [left * picture.width, top * picture.height, right * picture.width, bottom * picture.height]
            draw.rectangle([corner / SCALE for corner in corners], outline=_BOX, width=2)
        return picture
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().astype(int))
    columns = math.ceil(math.sqrt(len(shown)))
    small = [_fitted(Image.fromarray(frames[i]), _SIDE // columns - 2) for i in shown.tolist()]
    width, height = small[0].width + 2, small[0].height + 2
    whole = Image.new("RGB", (_SIDE, height * math.ceil(len(small) / columns)), _BACKGROUND)
    for place, frame in enumerate(small):
        whole.paste(frame, (place % columns * width, place // columns * height))
    return whole


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at most `side`. A small one is enlarged by a whole factor, to stay sharp."""
    longest = max(picture.size)
    if longest * 2 <= side:
        times = side // longest
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if longest <= side:
        return picture
    size = (max(1, picture.width * side // longest), max(1, picture.height * side // longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _write(picture: Image.Image, lines: Sequence[str], top: int) -> None:
    font = ImageFont.truetype(str(FONT), _TEXT)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((0, top + number * _LINE), line, font=font, fill=_INK)


def _end(text: str) -> str:
    """A name whose end is what tells it from others."""
    return text if len(text) <= _CHARACTERS else f"...{text[3 - _CHARACTERS :]}"
