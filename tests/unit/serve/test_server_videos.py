"""Videos in requests: the prompt that `erniekit chat` has, and nothing but the bytes in the request is opened."""

import base64
import sys
from pathlib import Path

import pytest
from support.pictures import write_video
from support.tiny_server import Asking, client
from support.vision_directories import vision_model_directory

from erniekit.config import load
from erniekit.data.records.fields import Notes
from erniekit.serve import server_video
from erniekit.serve.conversation import Conversation
from erniekit.serve.typed_media import open_medium

pytest.importorskip("av")
SETTINGS = {"video_min_frames": 2, "video_max_frames": 4, "video_max_pixels": 56 * 56}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=56 * 56)


@pytest.fixture(scope="module")
def server(model_dir: Path):
    with client(model_dir, max_request_images=2, max_model_len=400, **SETTINGS) as asking:
        yield asking


def data_uri(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def question(*urls: object) -> list[dict]:
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "12?"}]}]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_the_answer_is_that_of_chat(server: Asking, model_dir: Path, tmp_path: Path, name: str):
    video = write_video(tmp_path / name, frames=12)
    keys = {"model_name_or_path": str(model_dir), "compute_type": "fp32", "temperature": 0, "max_new_tokens": 6}
    cfg = load(None, keys | SETTINGS, command="chat")
    talk = Conversation(cfg, server.served.chat_model)
    vision = server.served.chat_model.vision
    assert vision is not None
    talk._waiting = [open_medium("video", str(video), vision, Notes())]
    list(talk.ask("12?"))
    kind = {"v.mp4": "video/mp4", "v.mkv": "video/x-matroska"}[name]
    asked = question(data_uri(video.read_bytes(), kind))
    answer = server.chat(messages=asked, max_tokens=6)
    assert (answer["choices"][0]["message"]["content"] or "") == talk.messages[-1]["content"]
    count = server.good("/tokenize", {"messages": asked})["count"]
    assert count == answer["usage"]["prompt_tokens"] > 9


def test_other_videos_give_other_answers(server: Asking, tmp_path: Path):
    videos = [write_video(tmp_path / f"{frames}.mp4", frames=frames, rate=1).read_bytes() for frames in (2, 8)]
    found = [server.chat(messages=question(data_uri(v)), logprobs=True)["choices"][0]["logprobs"] for v in videos]
    assert found[0] != found[1]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/x.mp4", "opens no addresses"),
        ("file:///etc/passwd", "no files"),
        ("data:image/png;base64,AAAA", "videos are taken as data URIs"),
        ("data:application/x-mpegurl;base64,AAAA", "videos are taken as data URIs"),
        ("video/mp4;base64,AAAA", "videos are taken as data URIs"),
        ("data:video/mp4,AAAA", "base64"),
        ("data:video/mp4;base64,####", "not valid base64"),
        (data_uri(PLAYLIST), "holds no MP4"),
        (data_uri(b"ffconcat version 1.0\nfile /etc/passwd\n"), "holds no MP4"),
        (data_uri(b"\0\0\0\x18ftypmp42" + b"x" * 40), "cannot be decoded"),
        (None, "expected"),
        (7, "expected"),
    ],
)
def test_what_is_not_opened(server: Asking, url: object, said: str):
    error = server.bad(messages=question(url))
    assert said in error["message"] and error["param"].startswith("messages"), error


def test_a_video_that_ends_early_is_refused(server: Asking, tmp_path: Path):
    content = write_video(tmp_path / "v.mp4", frames=30).read_bytes()
    error = server.bad(messages=question(data_uri(content[: len(content) // 2])))
    assert error["param"] == "messages[0].content[0].video_url" and "cannot be decoded" in error["message"], error


def test_limits(server: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = write_video(tmp_path / "v.mp4", frames=4).read_bytes()
    assert "at most 2 pictures and videos" in server.bad(messages=question(*[data_uri(content)] * 3))["message"]
    monkeypatch.setattr(server_video, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    assert "64 x 48 pixels" in server.bad(messages=question(data_uri(content)))["message"]
    monkeypatch.undo()
    monkeypatch.setattr(server_video, "MAX_DECODE_SECONDS", -1.0)
    assert "takes too long" in server.bad(messages=question(data_uri(content)))["message"]


def test_a_video_beyond_the_context_is_refused_before_it_is_decoded(
    server: Asking, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from erniekit.data.vision import video_file

    content = write_video(tmp_path / "v.mp4", frames=4).read_bytes()
    monkeypatch.setattr(video_file, "decode", lambda *_, **__: pytest.fail("decoded"))
    with client(model_dir, server.served.chat_model, max_model_len=4, **SETTINGS) as small:
        message = small.bad(messages=question(data_uri(content)))["message"]
    assert "a video of 2 frames has 4 tokens, and the context is 4" in message


def test_without_the_package_it_says_so(server: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = write_video(tmp_path / "v.mp4", frames=4).read_bytes()
    monkeypatch.delitem(sys.modules, "erniekit.data.vision.video_file", raising=False)
    monkeypatch.delattr("erniekit.data.vision.video_file", raising=False)
    monkeypatch.setattr("erniekit.data.vision.video_file", None, raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    from erniekit.data import vision

    monkeypatch.delattr(vision, "video_file", raising=False)
    error = server.bad(messages=question(data_uri(content)), status=501)
    assert "erniekit[video]" in error["message"]
