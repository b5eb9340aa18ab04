"""The processor: equal to transformers', its files, its errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import blocks, encoded, processor_messages, vision_directory, write_picture

from erniekit.data.vision.processor import load_processor
from erniekit.data.vision.processor_files import FILES, ProcessorSettings, read_settings, write_settings
from erniekit.data.vision.smart_resize import PUBLISHED, PixelLimits
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError, DataError

FIXTURE = Path(__file__).parents[3] / "parity" / "fixtures" / "vl_processor.npz"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return vision_directory(tmp_path_factory.mktemp("model") / "vl")


@pytest.fixture(scope="module")
def processor(directory):
    return load_processor(directory)


def user(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def image(source, **rest):
    return {"type": "image", "image": source, **rest}


def test_equal_to_transformers(processor):
    ours = processor(processor_messages(), add_generation_prompt=True)
    theirs = np.load(FIXTURE)
    assert set(theirs) | {"position_ids"} == set(ours)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype
        tolerance = 5e-7 if name == "pixel_values_videos" else 0  # torch normalises videos in another order
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)


def test_sources_of_pictures(processor, tmp_path):
    path = write_picture(tmp_path / "a.png")
    pixels = blocks(64, 48)
    expected = processor(user(image(pixels), "q"))
    for source in (str(path), "a.png", path, encoded(pixels), Image.fromarray(pixels)):
        found = processor(user(image(source), "q"), directory=tmp_path)
        np.testing.assert_array_equal(found["pixel_values"], expected["pixel_values"])
    openai = {"type": "image_url", "image_url": {"url": f"file://{path}", "detail": "high"}}
    np.testing.assert_array_equal(processor(user(openai, "q"))["input_ids"], expected["input_ids"])


def test_types_and_positions(processor):
    result = processor(user("Look: ", image(blocks(84, 56)), "?"))
    kinds, modality = result["mm_token_type_ids"][0], result["moe_mm_token_type_ids"][0]
    assert result["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert kinds.sum() == 6 and modality.sum() == 8  # the tags are the picture's too
    [first, *_] = np.flatnonzero(kinds)
    time, height, width = result["position_ids"][:, 0]
    assert (height[first : first + 6] - first).tolist() == [0, 0, 0, 1, 1, 1]
    assert (width[first : first + 6] - first).tolist() == [0, 1, 2, 0, 1, 2]
    assert (time[first : first + 6] == first).all()
    assert time[first + 6] == first + 3  # one more than the largest position before


def test_the_position_rules_differ_after_long_videos(processor):
    video = {"type": "video", "video": np.stack([blocks(56, 56, seed) for seed in range(8)])}
    training = processor(user(video, "q"))
    other = processor(user(video, "q"), position_rule="transformers")
    [*_, last] = np.flatnonzero(training["mm_token_type_ids"][0])
    assert training["position_ids"][0, 0, last + 1] - other["position_ids"][0, 0, last + 1] == 2  # 4 pairs, 2 rows
    np.testing.assert_array_equal(training["input_ids"], other["input_ids"])


def test_text_alone(processor):
    result = processor([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert "pixel_values" not in result and "pixel_values_videos" not in result
    assert not result["moe_mm_token_type_ids"].any()
    assert (result["position_ids"] == np.arange(result["input_ids"].shape[1])).all()


def test_with_and_without_the_generation_prompt(processor):
    question = user(image(blocks(64, 48)), "q")
    talk = [*question, {"role": "assistant", "content": "a"}]
    prompt = processor(question, add_generation_prompt=True)["input_ids"][0]
    whole = processor(talk)["input_ids"][0]
    bare = processor(question)["input_ids"][0]
    assert whole[: len(prompt)].tolist() == prompt.tolist() and len(whole) > len(prompt) > len(bare)
    assert whole[-1] == processor.tokenizer.sep_id


def test_limits_of_one_picture_and_of_all(directory, processor):
    big = blocks(280, 280)
    assert processor(user(image(big), "q"))["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert processor(user(image(big, max_pixels=56 * 56), "q"))["image_grid_thw"].tolist() == [[1, 4, 4]]
    larger = load_processor(directory, max_pixels=140 * 140)
    assert larger(user(image(big), "q"))["image_grid_thw"].tolist() == [[1, 10, 10]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (image("none.png"), "there is no file .*none.png"),
        (image(b"no picture"), "is not a picture of a known format"),
        (image("https://localhost/a.png"), "downloading is off"),
        (image(None), "names no source"),
        (image(blocks(64, 48), max_pixels="big"), "max_pixels of a picture"),
        (
            image(blocks(64, 48), min_pixels=10**6),
            "min_pixels of a picture or video is 1000000, and max_pixels is 7056",
        ),
        (image(blocks(64, 48), zoom=2), "unknown field 'zoom'"),
        ({"type": "audio", "audio": "a.wav"}, "a part of type 'audio'"),
        ({"type": "video", "video": []}, "a video has no frames"),
    ],
)
def test_what_cannot_be_prepared(processor, part, message):
    with pytest.raises(DataError, match=message):
        processor(user(part, "q"))


def test_arguments_that_cannot_be(directory, processor):
    for limits in ({"min_pixels": 0}, {"max_pixels": 0}, {"max_pixels": -5}, {"min_pixels": 10**9}):
        with pytest.raises(ConfigError, match=r"min_pixels: .* and max_pixels: .* must be more than 0"):
            load_processor(directory, **limits)
    with pytest.raises(ConfigError, match="position_rule: expected one of training, transformers; got 'theirs'"):
        processor(user("q"), position_rule="theirs")
    for conversations, what in (([user("q"), user("r")], "a list"), ("hello", "a string"), (user("q")[0], "a string")):
        with pytest.raises(DataError, match=rf"messages\[0\] is {what}, not a message: give one conversation"):
            processor(conversations)


def test_an_open_picture_whose_file_is_truncated(processor, tmp_path):
    content = encoded(blocks(300, 200))
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(DataError, match="cannot be decoded"):
        processor(user(image(opened), "q"))


def test_settings_travel_through_files(tmp_path):
    settings = ProcessorSettings()
    settings = replace(
        settings,
        images=PixelLimits(784, 7840),
        videos=PixelLimits(1568, 15680),
        choice=replace(settings.choice, fps=1.5, min_frames=3, max_frames=9, target_frames=5, draw_time=False),
        std=np.array([0.1, 0.2, 0.3], np.float32),
    )
    write_settings(tmp_path / "model", settings)
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(FILES)
    found = read_settings(tmp_path / "model")
    assert found.mean.tolist() == settings.mean.tolist() and found.std.tolist() == settings.std.tolist()
    assert replace(found, mean=settings.mean, std=settings.std) == settings


def test_both_published_forms_of_files(tmp_path):
    assert read_settings(tmp_path).images == ProcessorSettings().images
    baidu = {"min_pixels": 3136, "max_pixels": 4842768, "spatial_conv_size": 2, "video_min_frames": 4, "video_fps": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(baidu), "utf-8")
    found = read_settings(tmp_path)
    assert found.images == (3136, 4842768) and (found.choice.min_frames, found.choice.fps) == (4, 1.0)
    # What its class saves, once loaded: the bounds again in `size`, and keys that are not given as null.
    saved = baidu | {
        "size": {"min_pixels": 3136, "max_pixels": 4842768},
        "resample": 3,
        "do_pad": None,
        "crop_size": None,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved), "utf-8")
    assert read_settings(tmp_path).images == (3136, 4842768)
    del saved["min_pixels"], saved["max_pixels"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved), "utf-8")
    assert read_settings(tmp_path).images == (3136, 4842768)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(baidu), "utf-8")
    nested = {
        "image_processor": {"size": {"shortest_edge": 784, "longest_edge": 1568}, "patch_size": 14},
        "video_processor": {"size": {"shortest_edge": 1568, "longest_edge": 3136}, "max_frames": 20},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(nested), "utf-8")
    found = read_settings(tmp_path)
    assert found.images == (784, 1568) and found.videos == (1568, 3136) and found.choice.max_frames == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": "14"}, "patch_size: must be an integer"),
        ({"min_pixels": 100, "max_pixels": 50}, "min_pixels 100 is larger than max_pixels 50"),
        ({"image_mean": [0.5]}, "image_mean: must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std: must be positive"),
        ({"do_normalize": False}, "do_normalize: false is not supported"),
        ({"video_frames_sample": "rand"}, "must be one of leading, middle"),
    ],
)
def test_files_that_cannot_be(tmp_path, values, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, "resample: 2 is not supported: .* bicubic"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: 0.0078.* is not supported"),
        ({"do_center_crop": True}, "do_center_crop: True is not supported"),
        ({"size": {"height": 224, "width": 224}}, "size: .* it has height, width"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_settings_by_which_other_pixels_would_come_are_refused(tmp_path, name, values, message):
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        read_settings(tmp_path)


def test_keys_that_are_not_read_are_named_and_those_of_published_files_are_not(tmp_path):
    published = {
        "image_processor_type": "Ernie_45T_VLImageProcessor",
        "processor_class": "Ernie_45T_VLProcessor",
        "auto_map": {"AutoProcessor": "processing_ernie4_5_vl.Ernie4_5_VLProcessor"},
        "do_convert_rgb": True,
        "crop_size": None,
        "default_to_square": False,
        "data_format": "channels_first",
        "temporal_patch_size": 1,
        "num_frames": None,
    }
    files = {name: tmp_path / name for name in ("preprocessor_config.json", "video_preprocessor_config.json")}
    write_settings(tmp_path, ProcessorSettings())
    for path in files.values():
        added = {
            key: value for key, value in published.items() if not key.startswith("video_") or "video" not in path.name
        }
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | added | {"temporal_patch_size": 2}), "utf-8")
    with log.captured() as lines:
        read_settings(tmp_path)
    assert lines == []
    files["preprocessor_config.json"].write_text(json.dumps(published | {"max_pixel": 784, "fps": 1}), "utf-8")
    files["video_preprocessor_config.json"].write_text(json.dumps({"num_frames": 8, "total_pixels": 9}), "utf-8")
    with log.captured() as lines:
        read_settings(tmp_path)
    first, second = (text for _, text in lines)
    assert "/preprocessor_config.json: not read, so without effect: fps, max_pixel." in first
    assert "/video_preprocessor_config.json: not read, so without effect: num_frames, total_pixels." in second


def test_a_text_model_has_no_processor(tmp_path, directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (directory / name).read_text("utf-8").replace("<|IMAGE_END|>", "<|OTHER|>")
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="this is not a vision-language model"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean: \[0.5, 0.5, 0.5\] .* computes with \[0.48"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std: "),
        ({"patch_size": 16}, "patch_size: 16 in the processor's files, but the model computes with 14"),
        ({"merge_size": 4}, "merge_size: 4"),
    ],
)
def test_files_that_differ_from_the_model_are_refused(tmp_path, changes, message):
    """The model normalises pixels itself, so that other statistics would be ignored without a word."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    read_settings(tmp_path)  # for the processor alone they are settings like any other
    with pytest.raises(CheckpointError, match=message):
        read_settings(tmp_path, PUBLISHED)


@pytest.mark.parametrize("file", ["video_preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean: \[0.5, 0.5, 0.5\], but \[0.48.* for pictures"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std: "),
        ({"patch_size": 16}, "patch_size: 16, but 14 for pictures"),
        ({"merge_size": 4}, "merge_size: 4"),
    ],
)
def test_videos_are_prepared_like_pictures(tmp_path, file, changes, message):
    """Only the values for pictures reach the pixels."""
    values = {"video_processor": changes} if file == "processor_config.json" else changes
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        read_settings(tmp_path)
    write_settings(tmp_path, ProcessorSettings())
    assert read_settings(tmp_path).mean.tolist() == ProcessorSettings().mean.tolist()
