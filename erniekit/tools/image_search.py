"""A search for similar pictures in a local directory.

The similarity is simple: the mean of how far the histograms of 64 colours (4 levels of red, green and blue) overlap,
and how close 8 x 8 averages of the pictures are. It finds the same picture in another size or quality, and pictures of
the same colours in the same places. It knows nothing of what a picture shows.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from erniekit.data.records.errors import BadRecord
from erniekit.data.vision.images import IMAGE_OPTIONS, ImageOptions, load_image
from erniekit.data.vision.media import MediaReader
from erniekit.utils import log
from erniekit.utils.errors import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif")
_MAX_PICTURES = 20_000
_SIDE, _CELLS, _LEVELS = 32, 8, 4


class Hit(NamedTuple):
    """A picture that was found, by its path within the directory. `similarity` is 0 to 1."""

    name: str
    similarity: float
    pixels: np.ndarray


class ImageSearch:
    """The pictures of a directory and what is below it. They are read at the first search."""

    def __init__(self, directory: Path, options: ImageOptions = IMAGE_OPTIONS):
        """Raises ConfigError where there is no such directory, or no picture in it."""
        if not directory.is_dir():
            raise ConfigError(f"image_search_dir: there is no directory {directory}.")
        files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise ConfigError(f"image_search_dir: {directory} holds no picture ({', '.join(SUFFIXES)}).")
        if len(files) > _MAX_PICTURES:
            log.warning(f"image_search_dir: only the first {_MAX_PICTURES:,} of {len(files):,} pictures are searched")
        self._directory, self._files, self._options = directory, files[:_MAX_PICTURES], options
        self._reader = MediaReader(directory)
        self._features: np.ndarray | None = None

    def find(self, pixels: np.ndarray, count: int = 3) -> list[Hit]:
        """The `count` most similar pictures, the most similar one first."""
        if self._features is None:
            self._files, self._features = self._read_all()
        scores = similarities(features(pixels), self._features)
        hits = []
        for i in np.argsort(-scores, kind="stable")[:count].tolist():
            name = str(self._files[i].relative_to(self._directory))
            hits.append(Hit(name, float(scores[i]), load_image(str(self._files[i]), self._reader, self._options)))
        return hits

    def _read_all(self) -> tuple[list[Path], np.ndarray]:
        readable, rows = [], []
        for file in self._files:
            try:
                rows.append(features(load_image(str(file), self._reader, self._options)))
                readable.append(file)
            except BadRecord as error:
                log.warning(f"image_search_dir: left out: {error.reason}")
        return readable, np.array(rows, np.float32).reshape(len(rows), _LEVELS**3 + 3 * _CELLS**2)


def features(pixels: np.ndarray) -> np.ndarray:
    """What is compared of a picture: the shares of 64 colours, which add up to 1, then 8 x 8 averages of red, green and
    blue from 0 to 1.
    """
    small = np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX))
    levels = small.reshape(-1, 3).astype(np.int64) * _LEVELS // 256
    colours = levels @ np.array([_LEVELS**2, _LEVELS, 1])
    histogram = np.bincount(colours, minlength=_LEVELS**3) / len(colours)
    cell = _SIDE // _CELLS
    layout = small.reshape(_CELLS, cell, _CELLS, cell, 3).mean(axis=(1, 3)) / 255
    return np.concatenate([histogram, layout.reshape(-1)]).astype(np.float32)


def similarities(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How similar a picture is to each of others, 0 to 1."""
    colours = _LEVELS**3
    overlap = np.minimum(one[:colours], others[:, :colours]).sum(axis=1)
    closeness = 1 - np.abs(one[colours:] - others[:, colours:]).mean(axis=1)
    return (overlap + closeness) / 2
