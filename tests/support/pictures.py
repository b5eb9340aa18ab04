"""Pictures and videos that tests make themselves: the same ones each time."""

import io
import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"


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


def vision_directory(directory: Path, min_pixels: int = 56 * 56, max_pixels: int = 84 * 84) -> Path:
    """A directory with the demo's tokenizer, which knows pictures, and processor files whose limits are small."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(DEMO_MODEL / name, directory / name)
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    frames = {"min_frames": 2, "max_frames": 8}
    for name, values in (("preprocessor_config.json", {}), ("video_preprocessor_config.json", frames)):
        (directory / name).write_text(json.dumps({"size": size, **values}), "utf-8")
    return directory


# What tools/make_processor_fixture.py gave to transformers' processor: pictures that are made smaller and larger, and
# a video of an odd number of frames that has its size already, since transformers resizes videos by another filter.
PROCESSOR_CASE: list[dict[str, Any]] = [
    {"role": "system", "content": "Look."},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "0"},
            {"type": "text", "text": "First "},
            {"type": "image", "image": "1"},
            {"type": "video", "video": "0"},
            {"type": "text", "text": "What is this?"},
        ],
    },
]


def processor_media() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures and the video of PROCESSOR_CASE."""
    images = [blocks(150, 100, seed=1), blocks(30, 40, seed=2)]
    return images, [np.stack([blocks(84, 56, seed) for seed in range(5)])]


def processor_messages() -> list[dict[str, Any]]:
    """PROCESSOR_CASE with its media in their places."""
    images, videos = processor_media()
    sources = {"image": images, "video": videos}
    system, user = PROCESSOR_CASE
    parts = [
        part if part["type"] == "text" else {**part, part["type"]: sources[part["type"]][int(part[part["type"]])]}
        for part in user["content"]
    ]
    return [system, {**user, "content": parts}]


def write_video(
    path: Path,
    frames: int = 30,
    rate: int | Fraction = 10,
    width: int = 64,
    height: int = 48,
    bright_rows: int = 0,
    times: Sequence[float] | None = None,
) -> Path:
    """A video whose frame number i has the brightness 8 * i, but for the white `bright_rows` at the top. In .mkv files
    it is encoded without loss. `times`: the seconds of the frames, whose rate is then variable.
    """
    import av

    codecs = {".mkv": ("ffv1", "bgr0"), ".webm": ("libvpx", "yuv420p")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec, form = codecs.get(path.suffix, ("mpeg4", "yuv420p"))
        stream = container.add_stream(codec, rate=rate if times is None else 1000)
        stream.width, stream.height = width, height
        stream.pix_fmt = form
        for number in range(frames):
            pixels = np.full((height, width, 3), 8 * number % 256, np.uint8)
            pixels[:bright_rows] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
