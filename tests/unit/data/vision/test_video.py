"""Videos as files, directories and lists of frames."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.pictures import blocks, encoded, write_picture, write_video

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.frames import FrameOptions, draw_time
from erniekit.data.vision.images import resize
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.data.vision.video import VideoOptions, open_video

SMALL = PixelLimits(28 * 28, 56 * 56)


@pytest.fixture
def reader(tmp_path):
    return MediaReader(tmp_path)


def options(**choice):
    return VideoOptions(choice=FrameOptions(**choice))


def video(source, **rest):
    return {"type": "video", "video": source, **rest}


def brightness(opened):
    return [int(frame.mean().round()) for frame in opened.decode(None)]


class TestFiles:
    @pytest.fixture(autouse=True)
    def decoder(self):
        pytest.importorskip("av")

    def test_chosen_frames_and_their_times(self, reader, tmp_path):
        write_video(tmp_path / "a.mkv", frames=30, rate=10)
        opened = open_video(video("a.mkv"), reader, options(fps=2, min_frames=2, sample="leading"))
        assert (opened.width, opened.height) == (64, 48)
        assert opened.times == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
        assert brightness(opened) == [8 * i for i in (0, 5, 10, 15, 20, 25)]

    def test_a_container_that_does_not_count_its_frames(self, reader, tmp_path):
        write_video(tmp_path / "a.mkv", frames=7)
        opened = open_video(video("a.mkv"), reader, options())
        assert len(opened.times) == 7 and brightness(opened) == [8 * i for i in range(7)]

    def test_bytes_and_lossy_files(self, reader, tmp_path):
        data = write_video(tmp_path / "a.mp4", frames=12).read_bytes()
        opened = open_video(video(data), reader, options(target_frames=3, sample="leading"))
        assert np.allclose(brightness(opened), [0, 32, 64], atol=5)

    def test_options_of_one_video(self, reader, tmp_path):
        write_video(tmp_path / "a.mkv", frames=30, rate=10)
        assert len(open_video(video("a.mkv", target_frames=4), reader, options()).times) == 4
        assert len(open_video(video("a.mkv", video_fps=1, min_frames=1), reader, options()).times) == 3
        with pytest.raises(BadRecord, match="target_frames of a video must be a positive whole number"):
            open_video(video("a.mkv", target_frames="x"), reader)
        with pytest.raises(BadRecord, match=r"max_frames of a video must be a positive whole number, not 0\.5"):
            open_video(video("a.mkv", max_frames=0.5), reader)
        assert len(open_video(video("a.mkv", max_frames=4), reader, options(min_frames=16)).times) == 4
        for wrong in ({"min_frames": 9, "max_frames": 4}, {"min_frames": 500}):
            with pytest.raises(BadRecord, match=r"min_frames of a video is .*, and max_frames is"):
                open_video(video("a.mkv", **wrong), reader, options())

    @pytest.mark.parametrize("times", [{"fps": 1.0}, {"time_stamps": [0, 1]}])
    def test_times_beside_a_file_are_refused(self, reader, tmp_path, times):
        """Qwen's form has the frames to take of a second in `fps`."""
        write_video(tmp_path / "a.mkv")
        with pytest.raises(BadRecord, match=f"{next(iter(times))} stands beside the video file a.mkv") as caught:
            open_video(video("a.mkv", **times), reader)
        assert "video_fps" in caught.value.hint

    def test_files_that_cannot_be_decoded(self, reader, tmp_path):
        (tmp_path / "text.mp4").write_bytes(b"no video " * 100)
        with pytest.raises(BadRecord, match=r"text.mp4 cannot be decoded"):
            open_video(video("text.mp4"), reader)
        with pytest.raises(BadRecord, match=r"no file .*none.mp4"):
            open_video(video("none.mp4"), reader)

    def test_a_file_that_breaks_off(self, reader, tmp_path):
        data = write_video(tmp_path / "a.avi", frames=100, width=256, height=256).read_bytes()
        (tmp_path / "a.avi").write_bytes(data[: len(data) // 2])
        with pytest.raises(BadRecord, match=r"can be decoded|cannot be decoded|has no frames"):
            brightness(open_video(video("a.avi"), reader, options(fps=10)))

    @pytest.mark.parametrize(
        ("matrix", "size", "bright"),
        [
            ((0, 1, -1, 0), (48, 64), np.s_[:, 24:]),  # as a phone stores what it films upright: a turn to the right
            ((0, -1, 1, 0), (48, 64), np.s_[:, :24]),
            ((-1, 0, 0, -1), (64, 48), np.s_[24:]),
        ],
    )
    def test_a_video_is_turned_as_it_says(self, reader, tmp_path, matrix, size, bright):
        """The upper half of the stored frames is bright."""
        data = bytearray(write_video(tmp_path / "a.mp4", frames=3, bright_rows=24).read_bytes())
        place = data.index(b"tkhd") + 44
        across, down, across_below, down_below = (value << 16 for value in matrix)
        data[place : place + 36] = struct.pack(">9i", across, down, 0, across_below, down_below, 0, 0, 0, 1 << 30)
        opened = open_video(video(bytes(data)), reader, options())
        assert (opened.width, opened.height) == size
        for frame in opened.decode(None):
            assert frame.shape == (size[1], size[0], 3)
            assert frame[bright].mean() > 200 and frame.mean() < 140

    def test_a_video_that_was_cut_without_encoding_it_again(self, reader, tmp_path):
        """The file has frames from the key frame before the cut on, and says where what is shown begins."""
        import av

        write_video(tmp_path / "long.mp4", frames=30)
        with av.open(str(tmp_path / "long.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
            stream = whole.streams.video[0]
            copy = cut.add_stream_from_template(stream)
            begin = int(2 / stream.time_base)
            for packet in whole.demux(stream):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
                    cut.mux(packet)
        opened = open_video(video("cut.mp4"), reader, options(min_frames=30))
        assert len(opened.times) == 10
        assert np.allclose(brightness(opened), [8 * i % 256 for i in range(20, 30)], atol=5)

    @pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.webm"])
    def test_a_variable_frame_rate(self, reader, tmp_path, name):
        """As a recorder of the screen writes it: 10 frames a second for 2 seconds, then one every 2 seconds."""
        times = [i / 10 for i in range(20)] + [2.0 + 2 * i for i in range(6)]
        write_video(tmp_path / name, frames=26, times=times)
        opened = open_video(video(name), reader, options(fps=2, min_frames=4, sample="leading"))
        assert np.allclose(opened.times, [0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0], atol=0.11)
        assert all(min(abs(t - given) for given in times) < 2e-3 for t in opened.times)
        shown = [8 * min(range(26), key=lambda i: abs(times[i] - t)) for t in opened.times]
        assert np.allclose(brightness(opened), shown, atol=6)

    def test_a_variable_frame_rate_with_as_many_frames_as_asked_for(self, reader, tmp_path):
        """Where few frames are shown for most of the time, others make up the number."""
        times = [i / 10 for i in range(25)] + [1000.0]
        write_video(tmp_path / "a.mkv", frames=26, times=times)
        opened = open_video(video("a.mkv", target_frames=13), reader, options(sample="leading"))
        assert np.allclose(opened.times, [i / 5 for i in range(13)], atol=2e-3)
        assert brightness(opened) == [16 * i for i in range(13)]

    def test_times_that_cannot_be(self, reader, tmp_path):
        """Of a damaged file: the rate in its header counts."""
        write_video(tmp_path / "a.mkv", frames=4, times=[0, 0.1, 1e9, 1e9 + 0.1])
        assert open_video(video("a.mkv"), reader, options()).times[-1] < 10

    @pytest.mark.parametrize("rate", ["30000/1001", "24", "12.5"])
    @pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
    def test_a_steady_rate_has_the_times_of_the_training_code(self, reader, tmp_path, name, rate):
        """Whatever digits a container keeps of them."""
        write_video(tmp_path / name, frames=30, rate=Fraction(rate))
        opened = open_video(video(name), reader, options(min_frames=30))
        assert opened.times == [i / float(Fraction(rate)) for i in range(30)]

    def test_decoding_has_a_time_limit(self, reader, tmp_path):
        write_video(tmp_path / "a.mkv")
        with pytest.raises(BadRecord, match="takes too long"):
            brightness(open_video(video("a.mkv"), reader, VideoOptions(max_seconds=0.0)))


def test_frames_as_a_list_an_array_and_a_directory(reader, tmp_path):
    pixels = [blocks(64, 48, seed) for seed in range(12)]
    for number, frame in enumerate(pixels):
        (tmp_path / "clip").mkdir(exist_ok=True)
        (tmp_path / "clip" / f"frame{number}.png").write_bytes(encoded(frame))
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    names = [f"clip/frame{number}.png" for number in range(12)]
    for source in (names, np.stack(pixels), "clip", pixels):
        opened = open_video(video(source, fps=4), reader)
        assert opened.times == [i / 4 for i in range(12)]
        for found, expected in zip(opened.decode(None), pixels, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_frames_with_equal_numbers_do_not_come_in_the_order_of_the_file_system(reader, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    names = ["01.png", "1.png", "2.png", "10.png"]
    pixels = [blocks(64, 48, seed) for seed in range(len(names))]
    for name, frame in zip(names, pixels, strict=True):
        (tmp_path / "clip" / name).write_bytes(encoded(frame))
    for order in (names, names[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: (self / name for name in order))
        np.testing.assert_array_equal(list(open_video(video("clip", fps=1), reader).decode(None)), pixels)


def test_a_directory_of_frames_beside_a_data_file_that_is_named_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "data" / "clip").mkdir(parents=True)
    (tmp_path / "data" / "clip" / "0.png").write_bytes(encoded(blocks(64, 48, 0)))
    monkeypatch.chdir(tmp_path)
    opened = open_video(video("clip", fps=1), MediaReader(Path("data")))
    np.testing.assert_array_equal(list(opened.decode(None)), [blocks(64, 48, 0)])


def test_times_of_frames(reader):
    frames = [blocks(64, 48, seed) for seed in range(3)]
    assert open_video(video(frames, time_stamps=[0, 1.5, 7]), reader).times == [0, 1.5, 7]
    notes = Notes()
    assert open_video(video(frames), reader, options(fps=2), notes).times == [0, 0.5, 1]
    assert any("2 frames a second are assumed" in doubt for doubt in notes.doubts)
    for wrong in ([1, 2], [0, 1, "x"], [0, 1, -1], 5):
        with pytest.raises(BadRecord, match="time_stamps must have a number"):
            open_video(video(frames, time_stamps=wrong), reader)
    with pytest.raises(BadRecord, match="fps of a video must be a positive number"):
        open_video(video(frames, fps=0), reader)


def test_too_many_frames_are_thinned_out(reader):
    frames = [blocks(64, 48, seed) for seed in range(10)]
    opened = open_video(video(frames, fps=1), reader, options(max_frames=5, sample="leading"))
    assert opened.times == [0, 2, 4, 6, 8]


def test_frames_for_the_model(reader):
    """The time is drawn, then the frame is resized, then the last one is repeated."""
    pixels = [blocks(100, 80, seed) for seed in range(3)]
    opened = open_video(video(pixels, fps=1), reader)
    geometry = opened.measure(SMALL)
    assert geometry.grid == (4, 2, 4)
    result = opened.frames(geometry)
    for number in range(3):
        np.testing.assert_array_equal(result[number], resize(draw_time(pixels[number], number), geometry))
    np.testing.assert_array_equal(result[3], result[2])
    np.testing.assert_array_equal(opened.frames(geometry, draw=False)[0], resize(pixels[0], geometry))


def test_frames_that_are_no_video(reader, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadRecord, match="has no pictures"):
        open_video(video("empty"), reader)
    with pytest.raises(BadRecord, match="no frames"):
        open_video(video([]), reader)
    opened = open_video(video([blocks(64, 48), blocks(48, 64)]), reader)
    with pytest.raises(BadRecord, match=r"frame 1 .* has 48 x 64 pixels, the first one 64 x 48"):
        list(opened.decode(None))
    write_picture(tmp_path / "a.png")
    with pytest.raises(BadRecord, match=r"no file .*b.png"):
        list(open_video(video(["a.png", "b.png"]), reader).decode(None))


def test_times_of_frames_do_not_go_back(reader):
    frames = [blocks(64, 48, seed) for seed in range(3)]
    assert open_video(video(frames, time_stamps=[0, 1.5, 1.5]), reader).times == [0.0, 1.5, 1.5]
    with pytest.raises(BadRecord, match="time_stamps go back from 2 to 1 seconds at frame 2"):
        open_video(video(frames, time_stamps=[0, 2, 1]), reader)
