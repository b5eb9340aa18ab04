"""Pictures in requests: the prompt that training has, and nothing but the bytes in the request is opened."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_server import Asking, client
from support.vision_directories import vision_model_directory

from erniekit.config import load
from erniekit.serve.conversation import Conversation
from erniekit.serve.typed_media import Medium, picture_part
from erniekit.utils import log


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=84 * 84)


@pytest.fixture(scope="module")
def server(model_dir: Path):
    with client(model_dir, max_request_images=2) as asking:
        yield asking


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 70, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def question(*urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "12?"}]}]


def test_the_answer_is_that_of_chat(server: Asking, model_dir: Path):
    cfg = load(
        None,
        {"model_name_or_path": str(model_dir), "compute_type": "fp32", "temperature": 0, "max_new_tokens": 6},
        command="chat",
    )
    talk = Conversation(cfg, server.served.chat_model)
    talk._waiting = [Medium(picture_part(pixels()), "a picture")]
    list(talk.ask("12?"))
    assert talk.messages[-1]["role"] == "assistant"
    data = base64.b64encode(png(pixels())).decode()
    urls = [
        data_uri(png(pixels())),
        data_uri(png(pixels()), "image/PNG"),
        data_uri(png(pixels()), "image/png;charset=utf-8;name=a.png"),
        "data:image/png;base64,\r\n" + "\r\n".join(data[at : at + 76] for at in range(0, len(data), 76)) + "\n",
        "data:image/png; base64," + data.replace("+", "%2B").replace("=", "%3D"),
        "data:image/png;base64," + data.rstrip("="),
    ]
    for url in urls:
        answer = server.chat(messages=question(url), max_tokens=6)
        said = answer["choices"][0]["message"]
        assert (said["content"] or "") == talk.messages[-1]["content"]
    words = server.good("/tokenize", {"messages": question(data_uri(png(pixels())))})
    assert words["count"] == answer["usage"]["prompt_tokens"] > 9


def test_other_pictures_give_other_keys_and_values(server: Asking):
    first, second = (question(data_uri(png(pixels(seed)))) for seed in (1, 2))
    alone = [server.chat(messages=row, logprobs=True)["choices"][0]["logprobs"] for row in (first, second, first)]
    assert alone[0] == alone[2] != alone[1], "prompts with equal tokens and other pictures share nothing"


def huge_png() -> bytes:
    """A small file whose header promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


GIF = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/x.png", "opens no addresses"),
        ("https://example.org/x.png", "opens no addresses"),
        ("file:///etc/passwd", "no files"),
        ("/etc/passwd", "no files"),
        ("DATA:image/svg+xml;base64,AAAA", "PNG, JPEG"),
        ("data:image/png,AAAA", "base64"),
        ("data:image/png;base64,####", "not valid base64"),
        ("data:image/png;base64,", "holds no PNG"),
        (data_uri(GIF), "holds no PNG"),
        (data_uri(b"\x89PNG\r\n\x1a\n" + b"x" * 40), "cannot be decoded"),
        (data_uri(huge_png()), "pixels"),
    ],
)
def test_what_is_not_opened(server: Asking, url: str, said: str, monkeypatch: pytest.MonkeyPatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("an address was opened"))
    error = server.bad(messages=question(url))
    assert said in error["message"] and error["param"].startswith("messages[0].content[0]"), error


def test_other_parts_and_too_many_pictures(server: Asking):
    assert "at most 2 pictures and videos" in server.bad(messages=question(*[data_uri(png(pixels()))] * 3))["message"]
    sound = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]}]
    assert "expected text, image_url or video_url" in server.bad(messages=sound)["message"]
    odd = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": {"a": 1}}}]}]
    assert "expected" in server.bad(messages=odd)["message"]


def test_a_picture_whose_shape_cannot_be_used_is_named_by_its_place(server: Asking):
    flat = Image.new("RGB", (2000, 5))
    error = server.bad(messages=question(data_uri(png(pixels())), data_uri(png(np.asarray(flat)))))
    place = "messages[0].content[1].image_url"
    assert error["param"] == place
    assert error["message"].startswith(f"{place}: a picture of ") and "cannot be resized" in error["message"]


def test_options_of_one_picture_that_are_not_read_are_said_once(server: Asking, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    log._said.clear()

    def answer(detail: str, **beside: object) -> dict:
        part = {"type": "image_url", "image_url": {"url": data_uri(png(pixels())), "detail": detail}, **beside}
        return server.chat(messages=[{"role": "user", "content": [part]}], max_tokens=4)["choices"][0]["message"]

    plain = answer("auto", uuid="a")
    assert not said
    assert answer("low", max_pixels=784) == answer("low", max_pixels=784) == plain
    assert len(said) == 1 and said[0].startswith("detail, max_pixels of image_url in messages: no effect")
    answer("auto", word_of_a_client=1)
    assert len(said) == 2 and "word_of_a_client" not in said[1]
