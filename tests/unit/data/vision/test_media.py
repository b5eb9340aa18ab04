"""Where media come from: files, archives, data URIs, bytes; and what is refused."""

import base64
import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.pictures import blocks, encoded

from erniekit.data.records.errors import BadRecord
from erniekit.data.vision import media
from erniekit.data.vision.media import MediaReader, describe


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"picture")
    return MediaReader(tmp_path)


def content(reader, source, **options):
    with reader.open(source, **options) as file:
        return file.read()


def test_paths_are_relative_to_the_data_file(reader, tmp_path):
    assert content(reader, "sub/a.png") == b"picture"
    assert content(reader, str(tmp_path / "sub" / "a.png")) == b"picture"
    assert content(reader, f"file://{tmp_path}/sub/a.png") == b"picture"


@pytest.mark.parametrize(
    "source",
    [
        b"picture",
        {"bytes": b"picture", "path": None},
        {"path": "sub/a.png", "bytes": None},
        {"url": "data:image/png;base64," + base64.b64encode(b"picture").decode()},
        {"type": "image_url", "image_url": {"url": "data:,picture"}},
        "DATA:image/png;base64," + base64.b64encode(b"picture").decode(),
        "data:image/png;charset=utf-8;base64,cGlj\r\ndHVyZQ\n",
    ],
)
def test_other_sources(reader, source):
    assert content(reader, source) == b"picture"


def test_members_of_archives(reader, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dir/a.png", b"zipped")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in ("./dir/a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = 6
            archive.addfile(member, io.BytesIO(b"tarred"))
    assert content(reader, "all.zip/dir/a.png") == b"zipped"
    assert content(reader, "all.tar/dir/a.png") == b"tarred"
    assert content(reader, "all.tar/b.png") == b"tarred"
    with pytest.raises(BadRecord, match=r"no member 'c.png'"):
        reader.open("all.zip/c.png")
    with pytest.raises(BadRecord, match=r"no member 'c.png'"):
        reader.open("all.tar/c.png")
    with pytest.raises(BadRecord, match="at most 3 are read"):
        reader.open("all.zip/dir/a.png", limit=3)


def test_an_archive_that_is_written_again_is_read_again(reader, tmp_path):
    path = tmp_path / "all.zip"
    for number, text in enumerate((b"one", b"second")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", text)
        os.utime(path, ns=(number, number))
        assert content(reader, "all.zip/a") == text


def test_archives_that_are_read_by_turns_are_indexed_once_up_to_a_number_of_members(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.tar" for number in range(20)]
    for path in paths:
        with tarfile.open(path, "w") as archive:
            for name in ("a", "b"):
                archive.addfile(tarfile.TarInfo(name))
    indexed: list[Path] = []
    make = media._index_tar
    monkeypatch.setattr(media, "_index_tar", lambda path: indexed.append(path) or make(path))
    many, few = media._Archives(), media._Archives(members=5)
    for _ in range(2):
        for path in paths:
            assert many.read(path, "a", 10) == b""
    assert indexed == paths
    for number in (0, 1, 0, 2, 0, 1):  # two of them have four members
        few.read(paths[number], "a", 10)
    assert indexed[20:] == [paths[number] for number in (0, 1, 2, 1)]


def test_a_file_with_two_names_in_a_tar_file(reader, tmp_path):
    (tmp_path / "again.png").hardlink_to(tmp_path / "sub" / "a.png")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in ("./sub/a.png", "./again.png"):
            archive.add(tmp_path / name, name)
        assert archive.getmembers()[1].islnk()
    assert content(reader, "all.tar/again.png") == content(reader, "all.tar/sub/a.png") == b"picture"


def test_damaged_archives(reader, tmp_path):
    for name in ("bad.zip", "bad.tar"):
        (tmp_path / name).write_bytes(b"x" * 2000)
        with pytest.raises(BadRecord, match="cannot be read as an archive"):
            reader.open(f"{name}/a.png")
    (tmp_path / "some.tar.gz").write_bytes(b"x")
    with pytest.raises(BadRecord, match="compressed tar"):
        reader.open("some.tar.gz/a.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sub/b.png", "there is no file .*sub/b.png"),
        ("sub/a.png/b", "there is no file"),
        ("sub", "directory"),
        ("", "empty"),
        ("a\0b", "empty"),
        ("x" * 5000, "File name too long"),
        ("~nobody-of-this-name/a.png", "is not a path"),
        ("http://localhost/a.png", "downloading is off"),
        ("ftp://localhost/a.png", "cannot be read from ftp"),
        ("s3://bucket/a.png", "cannot be read from s3"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,%%%", "cannot be decoded"),
        ("data:,", "is empty"),
        (b"", "is empty"),
        ({}, "names no source"),
        (7, "not a number"),
        ({"path": 3}, "not a number"),
    ],
)
def test_what_cannot_be_opened(reader, source, message):
    with pytest.raises(BadRecord, match=message):
        reader.open(source)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_base64_without_its_type(reader, form):
    """The name of a missing file would be the whole picture."""
    content = base64.b64encode(encoded(blocks(60, 40), form)).decode()
    with pytest.raises(BadRecord, match="looks like a picture in base64") as caught:
        reader.open(content)
    assert len(str(caught.value)) < 250 and "data:image/png;base64," in caught.value.hint
    assert reader.open("data:image/png;base64," + content).read()


def test_bounds_and_kinds_of_files(reader, tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRecord, match="is empty"):
        reader.open("empty.png")
    with pytest.raises(BadRecord, match="not a regular file"):
        reader.open("pipe.png")
    with pytest.raises(BadRecord, match="7 bytes, at most 3 are read"):
        reader.open("sub/a.png", limit=3)
    with pytest.raises(BadRecord, match="at most 3 are read"):
        reader.open(b"picture", limit=3)


def test_a_server_that_does_not_answer_is_a_bad_row(tmp_path):
    with pytest.raises(BadRecord, match="cannot be downloaded"):
        MediaReader(tmp_path, allow_urls=True).open("http://127.0.0.1:1/a.png")


class _Answers(BaseHTTPRequestHandler):
    """A picture for addresses as browsers write them, and two kinds of broken answers."""

    def do_GET(self):
        if self.path == "/broken":
            self.wfile.write(b"no HTTP\r\n\r\n")
            return
        refused = "Python" in self.headers["User-Agent"] or self.path not in ("/a%20b/%E5%9B%BE.png?x=%2F", "/short")
        self.send_response(403 if refused else 200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"pict" if self.path == "/short" else b"picture")

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses_with_spaces_and_chinese_characters(tmp_path, address):
    """As browsers and other toolkits read them; some servers refuse the name of Python's own client."""
    reader = MediaReader(tmp_path, allow_urls=True)
    assert content(reader, f"{address}/a b/图.png?x=%2F") == b"picture"


@pytest.mark.parametrize(
    ("path", "message"),
    [("/broken", "no HTTP"), ("/short", "4 bytes, and 3 are missing"), ("/other", "403"), ("]:x[/", "cannot be")],
)
def test_answers_that_are_no_picture_are_bad_rows(tmp_path, address, path, message):
    with pytest.raises(BadRecord, match=f"cannot be downloaded: .*{message}|{message} downloaded"):
        MediaReader(tmp_path, allow_urls=True).open(address + path)


def test_short_names():
    assert describe("a.png") == "a.png"
    assert describe({"bytes": b"abc"}) == "3 bytes of data"
    assert describe(["a.png", "b.png"]) == "2 frames, the first a.png"
    assert len(describe("data:image/png;base64," + "A" * 1000)) < 70
