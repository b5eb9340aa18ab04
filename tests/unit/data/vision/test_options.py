"""What the keys about pictures become for the data pipeline, and what the model's directory says in their absence."""

from dataclasses import replace

import pytest
from support.pictures import vision_directory, write_picture

from erniekit.config import load
from erniekit.data.vision.encode import VisionEncoder
from erniekit.data.vision.options import processor_settings, vision_spec
from erniekit.data.vision.processor import load_processor
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.utils.errors import ConfigError, DataError

FILES = ProcessorSettings()  # what a published model's directory says


def cfg(**given):
    base = {"stage": "VL-SFT", "model_name_or_path": "m", "train_dataset_path": "a.jsonl", "output_dir": "o"}
    return load(None, base | given, "train")


def test_training_chooses_frames_as_ernies_training_code_and_all_else_as_the_model_says():
    spec = vision_spec(cfg(), FILES)
    choice = spec.settings.choice
    assert (choice.fps, choice.min_frames, choice.max_frames, choice.sample) == (2.0, 16, 480, "middle")
    assert choice.target_frames is None and choice.draw_time and choice.assumed_rate is None
    assert (spec.settings.images, spec.settings.videos) == (FILES.images, FILES.videos)
    assert (spec.truncation, spec.boxes, spec.missing_tags, spec.allow_urls) == ("drop", "relative", "error", False)
    assert processor_settings(cfg(), FILES).choice == FILES.choice  # not training: the model's own


def test_every_key_arrives():
    given = cfg(
        min_pixels=3136,
        max_pixels=78400,
        video_min_pixels=1568,
        video_max_pixels=15680,
        video_fps=0.5,
        video_min_frames=2,
        video_max_frames=8,
        video_target_frames=6,
        video_frames_sample="leading",
        render_timestamp=False,
        apply_exif=True,
        allow_urls=True,
        missing_media_tags="front",
        box_coordinates="pixels",
        truncation="shrink",
        max_decoded_pixels=10**9,
        video_decode_seconds=5,
        position_rule="transformers",
    )
    spec = vision_spec(given, FILES)
    assert (spec.settings.images, spec.settings.videos) == (PixelLimits(3136, 78400), PixelLimits(1568, 15680))
    choice = spec.settings.choice
    assert (choice.fps, choice.min_frames, choice.max_frames, choice.target_frames) == (0.5, 2, 8, 6)
    assert (choice.sample, choice.draw_time) == ("leading", False)
    assert spec.images.apply_exif and spec.images.max_pixels_decoded == 10**9 and spec.video_seconds == 5.0
    assert (spec.truncation, spec.boxes, spec.missing_tags, spec.allow_urls) == ("shrink", "pixels", "front", True)
    assert spec.position_rule == "transformers"


def test_minus_one_takes_back_the_number_of_frames_of_the_model():
    files = replace(FILES, choice=replace(FILES.choice, target_frames=70))
    assert processor_settings(cfg(), files).choice.target_frames == 70
    assert processor_settings(cfg(video_target_frames=-1), files).choice.target_frames is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_pixels": 783}, "max_pixels: 783 is too small: a picture has at least 784 pixels"),
        ({"max_pixels": 1000}, r"max_pixels: 1000 contradicts the model's own min_pixels: 3136\. Give min_pixels, too"),
        ({"video_max_frames": 4}, "video_max_frames: 4 contradicts video_min_frames, which is 16 where"),
        ({"video_min_frames": 500}, "video_min_frames: 500 contradicts video_max_frames, which is 480 where"),
        ({"video_min_pixels": 10**6}, "video_min_pixels: 1000000 contradicts the model's own video_max_pixels: 937664"),
    ],
)
def test_a_bound_that_contradicts_the_model(given, expected):
    with pytest.raises(ConfigError, match=expected):
        vision_spec(cfg(**given), FILES)


def test_the_keys_decide_what_a_record_becomes(tmp_path):
    processor = load_processor(vision_directory(tmp_path / "vl", 3136, 784 * 100), "vl")
    write_picture(tmp_path / "big.png", 280, 280)
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "fine"}]
    record, where = {"messages": messages, "images": ["big.png"]}, f"{tmp_path}/train.jsonl:3"

    def pictures(max_seq_len=1000, **given):
        encoder = VisionEncoder(processor.template, vision_spec(cfg(**given), processor.settings), max_seq_len)
        encoded = encoder("messages (VL)", record, where)
        return [document.pictures.grid.tolist() for document in encoded.documents]

    assert pictures() == [[[1, 20, 20]]]
    assert pictures(max_pixels=784 * 16) == [[[1, 8, 8]]]
    assert pictures(60) == []
    assert pictures(60, truncation="shrink")[0][0][1] < 16
    with pytest.raises(DataError, match="max_seq_len is 60"):
        pictures(60, truncation="error")


def test_each_record_has_a_drawn_bound_for_its_pictures(tmp_path):
    """The draw follows from the seed and the place, so that lengths measured before training stay true."""
    processor = load_processor(vision_directory(tmp_path / "vl", 784, 784 * 100), "vl")
    write_picture(tmp_path / "big.png", 280, 280)
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "fine"}]
    record = {"messages": messages, "images": ["big.png"]}

    def tokens(directory=tmp_path, **given):
        keys = {"adaptive_max_imgtoken_option": "4,25,64", "adaptive_max_imgtoken_rate": "0.2,0.3,0.5"} | given
        spec = vision_spec(cfg(**keys), processor.settings)
        encoder = VisionEncoder(processor.template, spec, 1000)
        encoded = [encoder("messages (VL)", record, f"{directory}/train.jsonl:{line}") for line in range(1, 201)]
        return [one.documents[0].pictures.sources[0].geometry.tokens for one in encoded]

    drawn = tokens()
    assert tokens() == drawn != tokens(seed=43)
    counts = [drawn.count(number) for number in (4, 25, 64)]
    assert sum(counts) == 200 and 20 < counts[0] < 60 < counts[2] < 140
    link = tmp_path / "moved"
    link.symlink_to(tmp_path)
    assert tokens(link) == drawn
    with pytest.raises(ConfigError, match=r"4 tokens are 3136 pixels, fewer than min_pixels: 7840\. Give at least 10"):
        tokens(min_pixels=7840)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"adaptive_max_imgtoken_option": "9,16"}, "adaptive_max_imgtoken_rate: 0 rates for 2 numbers"),
        ({"adaptive_max_imgtoken_rate": "1"}, "adaptive_max_imgtoken_rate: 1 rate for 0 numbers"),
        (
            {"adaptive_max_imgtoken_option": "9,16", "adaptive_max_imgtoken_rate": "0.5,0.6"},
            "rates must sum to 1, they sum to 1.1",
        ),
    ],
)
def test_bounds_to_draw_from_have_a_rate_each(given, expected):
    with pytest.raises(ConfigError, match=expected):
        cfg(**given)
