"""The tools by which a model thinks with images: it may zoom into a picture, and search for similar ones.

A result is the content of a tool message: its pictures are the next ones of the conversation. Whatever is wrong with a
call becomes text for the model, which may then call again.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erniekit.data.vision.boxes import SCALE
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.images import load_image
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.smart_resize import TOKEN_AREA
from erniekit.tools.image_search import ImageSearch
from erniekit.tools.result import BadCall, ToolResult, failure

ZOOM, SEARCH = "image_zoom_in_tool", "image_search"
ZOOM_AREA = 256 * TOKEN_AREA  # pixels that a smaller crop is enlarged to
_LARGEST_SCALE = 8

_INDEX = {"type": "number", "description": "Which picture of the conversation, counted from 0 (Picture 1 is 0)."}
_DESCRIPTIONS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    ZOOM: (
        "Cuts a region out of a picture and shows it enlarged, so that details can be read.",
        {
            "bbox_2d": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 4,
                "maxItems": 4,
                "description": (
                    "The region [x1, y1, x2, y2]: its left, upper, right and lower edge, from 0 to 1000 relative to "
                    "the whole picture."
                ),
            },
            "label": {"type": "string", "description": "What is in the region."},
            "img_idx": {**_INDEX, "description": f"{_INDEX['description']} Not given: the last one of the user."},
        },
        ["bbox_2d"],
    ),
    SEARCH: (
        "Finds pictures in a local collection that look similar to a picture of the conversation.",
        {"img_idx": _INDEX},
        ["img_idx"],
    ),
}


class ImageTools:
    """The tools of a conversation, by name."""

    def __init__(self, names: Sequence[str], spec: VisionSpec, search_dir: str | None = None):
        """`names`: of ZOOM and SEARCH. Raises ConfigError for a `search_dir` that cannot be searched."""
        self._spec = spec
        self._reader = MediaReader(Path.cwd())
        run: dict[str, Callable[[dict[str, Any], Sequence[dict[str, Any]]], ToolResult]] = {}
        if ZOOM in names:
            run[ZOOM] = self._zoom
        if SEARCH in names:
            assert search_dir is not None, "config/checks.py requires it"
            self._search_index = ImageSearch(Path(search_dir), spec.images)
            run[SEARCH] = self._search
        self._run = run

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The tools as the template shows them to the model."""
        return [_described(name) for name in self._run]

    def run(self, call: dict[str, Any], messages: Sequence[dict[str, Any]]) -> ToolResult:
        """Execute a call, {"name": str, "arguments": dict}, about the pictures of `messages`."""
        name, arguments = call["name"], call["arguments"]
        try:
            if name not in self._run:
                raise BadCall(f"there is no tool {name!r:.80}; the tools are {', '.join(self._run)}")
            known = _DESCRIPTIONS[name][1]
            unknown = next((key for key in arguments if key not in known), None)
            if unknown is not None:
                raise BadCall(f"{name} has no argument {unknown!r:.80}; its arguments are {', '.join(known)}")
            return self._run[name](arguments, messages)
        except BadCall as error:
            return failure(str(error))

    def _zoom(self, arguments: dict[str, Any], messages: Sequence[dict[str, Any]]) -> ToolResult:
        box = _box(arguments.get("bbox_2d"))
        label = arguments.get("label")
        if not isinstance(label, str | None):
            raise BadCall(f"label must be text, not {_shown(label)}")
        index, pixels = self._picture(arguments.get("img_idx"), messages)
        crop = crop_of(pixels, box)
        height, width = crop.shape[:2]
        large = enlarged(crop, min(ZOOM_AREA, self._spec.settings.images.max_pixels))
        size = f"{width} x {height} pixels"
        if large is not crop:
            size += f", enlarged to {large.shape[1]} x {large.shape[0]}"
        return ToolResult([picture_part(large)], f"{label or 'a region'} of Picture {index + 1}, {size}")

    def _search(self, arguments: dict[str, Any], messages: Sequence[dict[str, Any]]) -> ToolResult:
        if "img_idx" not in arguments:
            raise BadCall("img_idx is missing: the number of the picture to search for, counted from 0")
        index, pixels = self._picture(arguments["img_idx"], messages)
        hits = self._search_index.find(pixels)
        if not hits:
            raise BadCall("the collection has no picture that can be read")
        parts: list[dict[str, Any]] = []
        for hit in hits:
            parts += [
                {"type": "text", "text": f"{hit.name} (similarity {hit.similarity:.2f})\n"},
                picture_part(hit.pixels),
                {"type": "text", "text": "\n"},
            ]
        names = ", ".join(hit.name for hit in hits)
        return ToolResult(parts[:-1], f"similar to Picture {index + 1}: {names}")

    def _picture(self, index: Any, messages: Sequence[dict[str, Any]]) -> tuple[int, np.ndarray]:
        """A picture of the conversation, with its number. Without an index: the last one that the user gave, since the
        coordinates are those of an original picture.
        """
        pictures = [(message["role"], part["image"]) for message in messages for part in _images(message)]
        if not pictures:
            raise BadCall("the conversation has no picture")
        if index is None:
            index = max((i for i, (role, _) in enumerate(pictures) if role != "tool"), default=len(pictures) - 1)
        whole = isinstance(index, int) or (isinstance(index, float) and index.is_integer())
        if not whole or isinstance(index, bool) or not 0 <= index < len(pictures):
            raise BadCall(
                f"img_idx is {_shown(index)}, but the pictures have the numbers 0 to {len(pictures) - 1} (Picture 1 "
                "is 0)"
            )
        number = int(index)
        return number, load_image(pictures[number][1], self._reader, self._spec.images)


def picture_part(pixels: np.ndarray) -> dict[str, Any]:
    """The content part of a picture, uint8 [height, width, 3]."""
    return {"type": "image", "image": pixels}


def crop_of(pixels: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The region of a picture that a box from 0 to 1000 covers; at least one pixel."""
    height, width = pixels.shape[:2]
    (left, right), (top, bottom) = (
        _edges(low, high, size) for low, high, size in ((box[0], box[2], width), (box[1], box[3], height))
    )
    return pixels[top:bottom, left:right]


def enlarged(pixels: np.ndarray, area: int) -> np.ndarray:
    """A picture with fewer pixels than `area` enlarged to about as many, at most eightfold; another one as it is."""
    height, width = pixels.shape[:2]
    scale = min(math.sqrt(area / (width * height)), _LARGEST_SCALE)
    if scale <= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _edges(low: float, high: float, size: int) -> tuple[int, int]:
    begin = min(math.floor(low / SCALE * size), size - 1)
    return begin, min(max(math.ceil(high / SCALE * size), begin + 1), size)


def _box(value: Any) -> list[float]:
    """The argument bbox_2d, checked."""
    if value is None:
        raise BadCall("bbox_2d is missing: the region [x1, y1, x2, y2], from 0 to 1000")
    if not isinstance(value, list) or len(value) != 4:
        raise BadCall(f"bbox_2d must be a list of four numbers [x1, y1, x2, y2], not {_shown(value)}")
    for number in value:
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise BadCall(f"bbox_2d must hold numbers, not {_shown(number)}")
        if not 0 <= number <= SCALE:
            raise BadCall(f"bbox_2d {_shown(value)} lies outside the picture: its numbers go from 0 to {SCALE}")
    if value[0] >= value[2] or value[1] >= value[3]:
        raise BadCall(
            f"bbox_2d {_shown(value)} has no area or its corners swapped: write [left, upper, right, lower edge]"
        )
    return value


def _images(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def _described(name: str) -> dict[str, Any]:
    description, properties, required = _DESCRIPTIONS[name]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:100]
