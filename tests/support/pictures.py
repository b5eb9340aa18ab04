"""Pictures and videos that tests make themselves: the same ones each time."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def blocks(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Random blocks of colour with hard edges, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(2, height // 7), max(2, width // 7), 3), np.uint8)
    rows = np.arange(height) * len(coarse) // height
    columns = np.arange(width) * coarse.shape[1] // width
    return coarse[rows][:, columns]


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_picture(path: Path, width: int = 64, height: int = 48, seed: int = 0, **options: Any) -> Path:
    """A PNG file of random blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(blocks(width, height, seed), **options))
    return path
