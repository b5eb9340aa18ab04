"""Damaged records with pictures, damaged pictures, videos and processor files: each is read, or refused by a UserError
that names the file; never another exception. More of them: `FUZZ_CASES=20000 FUZZ_SEED=1 pytest tests/fuzz`.
"""

import io
import json
import os
import random

import numpy as np
import pytest
from PIL import Image
from support.mutations import mutated_bytes, mutated_json
from support.pictures import blocks, encoded, vision_directory, write_picture, write_video

from erniekit.data.packed_batch import IGNORE
from erniekit.data.records.errors import BadRecord, MissingPackage
from erniekit.data.vision.encode import VisionEncoder, VisionSpec
from erniekit.data.vision.images import load_image
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.processor import load_processor
from erniekit.data.vision.processor_files import read_settings, write_settings
from erniekit.data.vision.video import VideoOptions, open_video
from erniekit.utils.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"bbox_2d": [1, 2, 30, 40], "img_idx": 0}}}
RECORDS = {
    "erniekit": {
        "is_system": 0,
        "text_info": [
            {"text": "q", "tag": "mask"},
            {"text": "", "tag": "no_mask", "tool_calls": [{"name": "zoom", "arguments": '{"bbox_2d": [1, 2, 3, 4]}'}]},
            {"text": "", "tag": "mask", "tool_response": True},
            {"text": "a", "tag": "no_mask"},
        ],
        "image_info": [
            {"image_url": "a.png", "matched_text_index": 0},
            {"image_url": "b.png", "matched_text_index": 2},
        ],
        "order": {"type": ["image", "text", "text", "image", "text", "text"], "index": [0, 0, 1, 1, 2, 3]},
        "tools": [CALL | {"function": {"name": "zoom", "parameters": {}}}],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<video>?"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "b.png"}, "max_pixels": 7000}]},
            {"role": "assistant", "content": '[{"bbox_2d": [1, 2, 3, 4]}] <bbox> <ref-object>'},
        ],
        "images": ["a.png"],
        "videos": [["a.png", "a.png"]],
        "objects": {"ref": ["x"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1", "image_id": [0]},
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}],
        "image": {"path": "a.png", "bytes": None},
    },
    "alpaca": {"instruction": "<image>q", "input": "i", "output": "a", "history": [["q", "a"]], "images": ["a.png"]},
    "text": {"text": ["one <image>", "two"], "images": ["a.png"]},
    "messages (DPO)": {
        "messages": [{"role": "user", "content": "<image><video>Where?"}],
        "images": ["a.png"],
        "videos": [["a.png", "a.png"]],
        "chosen": {"role": "assistant", "content": '{"bbox_2d": [1, 2, 30, 40]}'},
        "rejected": [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "t"}]
        + [{"role": "assistant", "content": "no"}],
    },
    "erniekit (DPO)": {"src": ["<image>q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0], "images": ["a.png"]},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return vision_directory(tmp_path_factory.mktemp("model") / "vl")


def test_damaged_records(directory, tmp_path):
    write_picture(tmp_path / "a.png", 64, 48)
    write_picture(tmp_path / "b.png", 30, 80)
    processor, random_numbers = load_processor(directory, "vl"), random.Random(SEED)
    counts = {"read": 0, "refused": 0}
    for kind, record in RECORDS.items():
        for truncation in ("drop", "shrink", "error"):
            encoder = VisionEncoder(processor.template, VisionSpec(processor.settings, truncation), 2000)
            encoder(kind, json.dumps(record).encode(), f"{tmp_path}/x:1")
    for number in range(CASES):
        kind = random_numbers.choice(list(RECORDS))
        raw = mutated_json(RECORDS[kind], random_numbers)
        spec = VisionSpec(
            processor.settings,
            random_numbers.choice(("drop", "shrink", "error")),
            random_numbers.choice(("relative", "pixels", "fraction")),
            random_numbers.choice(("error", "front")),
        )
        encoder = VisionEncoder(processor.template, spec, random_numbers.choice((60, 300, 2000)))
        where = f"{tmp_path}/x.jsonl:{number}"
        try:
            encoded_record = encoder(kind, raw, where)
        except UserError as error:
            # without PyAV a video file is refused as such, whatever record names it
            assert str(error).startswith(where) or isinstance(error, MissingPackage), raw
            assert "worth a report" not in str(error), (raw, str(error))
            counts["refused"] += 1
            continue
        counts["read"] += 1
        assert bool(encoded_record.documents) != bool(encoded_record.dropped)
        for document in encoded_record.documents:
            assert len(document.ids) == len(document.labels) and (document.labels != IGNORE).any()
            if document.pictures is not None:
                assert len(document.pictures.modality) == len(document.pictures.positions) == len(document.ids)
    assert min(counts.values()) > CASES * 0.02, counts


def test_damaged_pictures(tmp_path):
    reader, random_numbers = MediaReader(tmp_path), random.Random(SEED)
    animation = io.BytesIO()
    frames = [Image.fromarray(blocks(30, 20, seed)) for seed in range(3)]
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    files = [encoded(blocks(60, 40), form) for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM")]
    files.append(animation.getvalue())
    for _ in range(CASES // 2):
        data = mutated_bytes(random_numbers.choice(files), random_numbers)
        try:
            pixels = load_image(data, reader)
        except BadRecord:
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_damaged_videos(tmp_path):
    pytest.importorskip("av")
    reader, random_numbers = MediaReader(tmp_path), random.Random(SEED)
    files = [write_video(tmp_path / name, frames=12).read_bytes() for name in ("a.mkv", "a.mp4", "a.avi")]
    for _ in range(CASES // 10):
        data = mutated_bytes(random_numbers.choice(files), random_numbers)
        try:
            video = open_video({"type": "video", "video": data}, reader, VideoOptions(max_seconds=20))
            frames = list(video.decode(None))
        except BadRecord:
            continue
        assert len(frames) == len(video.times)


def test_damaged_processor_files(directory, tmp_path):
    write_settings(tmp_path, read_settings(directory))
    random_numbers = random.Random(SEED)
    names = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for _ in range(CASES // 2):
        name = random_numbers.choice(names)
        (tmp_path / name).write_bytes(mutated_json(json.loads(whole[name]), random_numbers))
        try:
            read_settings(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
        (tmp_path / name).write_bytes(whole[name])
