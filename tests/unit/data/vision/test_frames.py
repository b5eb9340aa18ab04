"""Which frames of a video are used, and the time on them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.pictures import blocks

from erniekit.data.records.errors import BadRecord
from erniekit.data.vision import frames
from erniekit.data.vision.frames import FrameOptions, choose_frames, draw_time, time_text
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.video import VideoOptions
from erniekit.utils.errors import DataError

OPTIONS = FrameOptions()
LEADING = replace(OPTIONS, sample="leading")


def test_frames_by_rate():
    assert choose_frames(300, 30, LEADING) == list(range(0, 300, 15))
    middle = choose_frames(300, 30, OPTIONS)
    assert middle[:4] == [8, 22, 38, 52] and middle[-1] == 292 and len(middle) == 20
    assert choose_frames(300, 29.97, LEADING)[:4] == [0, 15, 30, 45]


def test_bounds_of_their_number():
    few = choose_frames(300, 30, replace(LEADING, fps=1))  # 10 would be fewer than 16
    assert few[:3] == [0, 18, 37] and few[-1] == 281 and len(few) == 16
    many = choose_frames(30_000, 30, replace(OPTIONS, max_frames=20))
    assert len(many) == 20 and many[0] == 749
    assert choose_frames(300, 30, replace(OPTIONS, target_frames=4, min_frames=50)) == [37, 112, 187, 262]
    assert choose_frames(300, 30, replace(LEADING, target_frames=4)) == [0, 75, 150, 225]


def test_all_frames_of_a_short_video_and_none_twice():
    assert choose_frames(5, 30, OPTIONS) == [0, 1, 2, 3, 4]
    for rate in (30, 2, 2.5, 1, 23.976):
        for fps in (1, 2, 29.97, 30, 60):
            chosen = choose_frames(200, rate, replace(OPTIONS, fps=fps))
            assert len(set(chosen)) == len(chosen) and chosen == sorted(chosen) and chosen[-1] < 200
    assert choose_frames(200, 30, replace(OPTIONS, fps=30)) == list(range(200))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "time: 00:00:00.00"),
        (61.25, "time: 00:01:01.25"),
        (3725.04, "time: 01:02:05.04"),
        (9.996, "time: 00:00:10.00"),
    ],
)
def test_times(seconds, text):
    assert time_text(seconds) == text


def test_the_time_stands_in_the_upper_left_corner():
    frame = blocks(400, 300)
    drawn = draw_time(frame, 1.5)
    changed = np.argwhere((drawn != frame).any(axis=2))
    assert len(changed) > 100 and changed[:, 0].max() < 45 and changed[:, 1].max() < 280
    assert (drawn[changed[:, 0], changed[:, 1]] == 0).all(axis=1).any()
    assert (draw_time(frame, 1.5) == drawn).all() and (draw_time(frame, 2.5) != drawn).any()


def test_frames_too_small_for_a_time():
    with pytest.raises(BadRecord, match="9 x 40 pixels are too small"):
        draw_time(blocks(9, 40), 0)
    part = {"type": "video", "video": np.zeros((2, 40, 9, 3), np.uint8), "fps": 1}
    with pytest.raises(BadRecord, match="9 x 40 pixels are too small"):  # before anything is decoded
        plan_media([part], MediaReader(Path()), ProcessorSettings(), VideoOptions())
    [plan] = plan_media([part], MediaReader(Path()), ProcessorSettings(), VideoOptions(FrameOptions(draw_time=False)))
    assert plan.pixels().shape[0] == 2


def test_without_its_font_nothing_is_drawn_in_silence(monkeypatch, tmp_path):
    monkeypatch.setattr(frames, "FONT", tmp_path / "none.ttf")
    frames._font.cache_clear()
    try:
        with pytest.raises(DataError, match=r"font that draws the time.*none.ttf"):
            draw_time(blocks(50, 50), 0)
    finally:
        frames._font.cache_clear()
