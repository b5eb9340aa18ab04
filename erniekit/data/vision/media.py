"""The sources of a picture's or video's bytes: a file, a member of an archive, a data URI, a URL, or the record."""

import base64
import io
import os
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.values import kind_of
from erniekit.utils.errors import DataError
from erniekit.utils.user_files import open_regular
from erniekit.utils.version import __version__

MAX_IMAGE_BYTES = 256 << 20
MAX_VIDEO_BYTES = 8 << 30
_ARCHIVES = (".tar", ".zip")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# The fields of an object around a source, the first of which counts.
SOURCES = ("bytes", "url", "path", "image", "video", "image_url", "video_url", "frames")
# How PNG, JPEG, GIF and WebP files begin in base64.
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/4", "R0lGODlh", "R0lGODdh", "UklGR")
_MAX_MEMBERS = 4_000_000
_SECONDS = 30.0  # that a server has for each read
_OF_ADDRESSES = "%:/?#[]@!$&'()*+,;=-._~"  # characters that stay; others, such as Chinese ones and spaces, are encoded
_USER_AGENT = f"erniekit/{__version__}"  # many servers refuse Python's own name


@dataclass(frozen=True)
class MediaReader:
    """Opens the media that records name. `directory`: what relative paths are relative to, the data file's directory.

    A source is a path, a path that continues inside a .tar or .zip file (`pictures.zip/cat.jpg`), a data URI, an
    http(s) URL if `allow_urls`, bytes, or an object with `bytes`, `path` or `url` as parquet files and OpenAI's format
    have it.
    """

    directory: Path
    allow_urls: bool = False

    def open(self, source: Any, limit: int = MAX_IMAGE_BYTES) -> BinaryIO:
        """The content of a source for reading; close it. BadRecord says what is wrong with it, such as more than
        `limit` bytes.
        """
        source = unwrap(source)
        if isinstance(source, bytes | bytearray | memoryview):
            return _bounded(bytes(source), limit, "the bytes in the record")
        if not isinstance(source, str):
            raise BadRecord(
                f"a media source must be a path, a URL or bytes, not {kind_of(source)}", "write the path as text"
            )
        if source[:5].lower() == "data:":
            return _bounded(_decode_data_uri(source, limit), limit, "the data URI")
        if "://" in source[:10] and not source.lower().startswith("file://"):
            return self._open_url(source, limit)
        return self._open_path(source, limit)

    def local_path(self, source: Any) -> Path | None:
        """The file or directory that a source names; None for all other kinds of source."""
        source = unwrap(source)
        if not isinstance(source, str) or source[:5].lower() == "data:":
            return None
        if not source.strip() or "\0" in source:
            raise BadRecord("the path of a picture or video is empty", "give the path, or remove the entry")
        if source.lower().startswith("file://"):
            return Path(unquote(urlsplit(source).path))
        if "://" in source[:10]:
            return None
        try:
            return self.directory / Path(source).expanduser()
        except RuntimeError as error:
            raise BadRecord(f"{source[:100]!r} is not a path: {error}", "write the directory instead of ~") from None

    def _open_path(self, source: str, limit: int) -> BinaryIO:
        if len(source) > 64 and source.startswith(_BASE64_HEADS):
            hint = "write data:image/png;base64, (or another type) in front of it"
            raise BadRecord(f"{describe(source)} looks like a picture in base64", hint)
        path = self.local_path(source)
        assert path is not None
        kind = kind_of_file(path)
        if kind == "directory":
            raise BadRecord(
                f"{path} is a directory", "give the file of a picture; only a video may be a directory, of its frames"
            )
        if kind:
            return _open_file(path, limit)
        inside = _split_archive(path)
        if inside is None:
            raise BadRecord(
                f"there is no file {path}", f"paths are relative to the data file's directory, {self.directory}"
            )
        archive, member = inside
        return _bounded(_archives.read(archive, member, limit), limit, str(path))

    def _open_url(self, url: str, limit: int) -> BinaryIO:
        scheme = url.partition(":")[0].lower()
        if scheme not in ("http", "https"):
            raise BadRecord(f"media cannot be read from {scheme}: addresses", "use a path, http, https or a data URI")
        if not self.allow_urls:
            raise BadRecord(
                f"{url[:100]} is an address, and downloading is off",
                "download the files and give their paths, or set allow_urls: true",
            )
        try:
            request = urllib.request.Request(quote(url, safe=_OF_ADDRESSES), headers={"User-Agent": _USER_AGENT})
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                content = answer.read(limit + 1)
                if answer.length and len(content) <= limit:
                    raise OSError(f"the server sent {len(content):,} bytes, and {answer.length:,} are missing")
        except (OSError, ValueError, HTTPException) as error:
            reason = " ".join(str(error).split())
            raise BadRecord(f"{url[:100]} cannot be downloaded: {reason}", "check the address") from None
        return _bounded(content, limit, url[:100])


def kind_of_file(path: Path) -> str:
    """ "file" (of any kind), "directory", or "" if nothing is there. BadRecord for what the system cannot look at."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise BadRecord(f"{str(path)[:200]}: {error.strerror}", "check the path and its permissions") from None
    return "directory" if stat.S_ISDIR(mode) else "file"


def unwrap(source: Any) -> Any:
    """What an object around a source says: {"bytes": ...}, {"path": ...}, {"url": ...}, {"image": ...}."""
    while isinstance(source, Mapping):
        inner = [source[key] for key in SOURCES if source.get(key)]
        if not inner:
            raise BadRecord("a picture or video names no source", 'give a path, or {"bytes": ...}, or {"url": ...}')
        source = inner[0]
    return str(source) if isinstance(source, os.PathLike) else source


def describe(source: Any) -> str:
    """A short name of a source for messages."""
    try:
        source = unwrap(source)
    except BadRecord:
        return "a picture or video without a source"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes of data"
    if isinstance(source, str):
        return source if len(source) <= 120 else source[:60] + "..."
    if isinstance(source, list | tuple):
        return f"{len(source)} frames, the first {describe(source[0])}" if source else "a list of no frames"
    return type(source).__name__


def _bounded(data: bytes, limit: int, name: str) -> BinaryIO:
    if not data:
        raise BadRecord(f"{name} is empty", "give the file its content, or remove the row")
    if len(data) > limit:
        raise BadRecord(f"{name} has {len(data):,} bytes, at most {limit:,} are read", "make the file smaller")
    return io.BytesIO(data)


def _decode_data_uri(source: str, limit: int) -> bytes:
    head, comma, body = source.partition(",")
    if not comma:
        raise BadRecord("a data URI has no comma between its type and its content", "write data:image/png;base64,...")
    if len(body) > 2 * limit:
        raise BadRecord(f"a data URI has {len(body):,} characters, too many to be read", "give a path instead")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64_content(body)
    except ValueError as error:
        raise BadRecord(f"the base64 content of a data URI cannot be decoded: {error}", "write it again") from None


def base64_content(text: str) -> bytes:
    """The bytes that the base64 text of a data URI stands for. As in browsers it may be percent-encoded, have line
    breaks and lack its padding. Raises ValueError for anything else.
    """
    text = "".join(unquote(text).split())
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _open_file(path: Path, limit: int) -> BinaryIO:
    """A regular file that is not empty and not larger than `limit`."""
    try:
        with open_regular(path, DataError) as checked:
            status = os.fstat(checked.fileno())
            file = os.fdopen(os.dup(checked.fileno()), "rb")
    except DataError as error:
        raise BadRecord(str(error).removesuffix("."), "a picture or video must be a regular file") from None
    if 0 < status.st_size <= limit:
        return file
    file.close()
    if status.st_size:
        raise BadRecord(f"{path} has {status.st_size:,} bytes, at most {limit:,} are read", "make the file smaller")
    raise BadRecord(f"{path} is empty", "copy the file again, or remove the row")


def _split_archive(path: Path) -> tuple[Path, str] | None:
    """The archive among the parents of a path, and the member's name; None if there is none."""
    parts = path.parts
    for count in range(len(parts) - 1, 0, -1):
        archive = Path(*parts[:count])
        name = archive.name.lower()
        if kind_of_file(archive) != "file":
            continue
        if name.endswith(_COMPRESSED_TARS):
            raise BadRecord(
                f"{archive} is a compressed tar file, whose members can only be read one after another",
                "make a .zip or an uncompressed .tar file of it, or unpack it",
            )
        return (archive, "/".join(parts[count:])) if name.endswith(_ARCHIVES) else None
    return None


class _Index(NamedTuple):
    """How a member of an archive is read: by its name, at most a number of bytes and one more. `members`: how many."""

    read: Callable[[str, int], bytes]
    members: int


class _Archives:
    """The archives that were used last, each with an index of its members. An archive that changed is indexed again.

    Shuffled pictures come from all archives of a data set by turns, so that many are kept: at most `capacity`, of which
    zip files stay open, with at most `members` entries in all.
    """

    def __init__(self, capacity: int = 256, members: int = 1_000_000):
        self._indexes: OrderedDict[tuple[Path, int, int], _Index] = OrderedDict()
        self._capacity, self._members = capacity, members

    def read(self, archive: Path, member: str, limit: int) -> bytes:
        """The content of a member, at most `limit` + 1 bytes of it."""
        status = archive.stat()
        key = (archive, status.st_mtime_ns, status.st_size)
        index = self._indexes.pop(key, None)
        if index is None:
            make = _index_zip if archive.name.lower().endswith(".zip") else _index_tar
            try:
                index = make(archive)
            except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
                raise BadRecord(f"{archive} cannot be read as an archive: {error}", "copy the file again") from None
        self._indexes[key] = index  # the one that was used last
        while len(self._indexes) > 1 and self._are_too_many():
            self._indexes.popitem(last=False)
        try:
            return index.read(member, limit)
        except KeyError:
            raise BadRecord(f"{archive} has no member {member!r}", "check the path after the archive's name") from None
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
            raise BadRecord(f"{member} of {archive} cannot be read: {error}", "make the archive again") from None

    def _are_too_many(self) -> bool:
        indexes = list(self._indexes.values())
        return len(indexes) > self._capacity or sum(index.members for index in indexes) > self._members


def _index_zip(archive: Path) -> _Index:
    opened = zipfile.ZipFile(archive)

    def read(member: str, limit: int) -> bytes:
        with opened.open(member) as file:
            return file.read(limit + 1)

    return _Index(read, len(opened.filelist))


def _index_tar(archive: Path) -> _Index:
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(archive, "r:") as opened:
        for member in opened:
            if stat.S_IFMT(member.mode) in (0, stat.S_IFREG) and member.isreg():
                places[member.name.removeprefix("./")] = member.offset_data, member.size
            elif member.islnk():  # a file with several names, whose content stands at the first one
                linked = places.get(member.linkname.removeprefix("./"))
                if linked is not None:
                    places[member.name.removeprefix("./")] = linked
            if len(places) > _MAX_MEMBERS:
                raise ValueError(f"more than {_MAX_MEMBERS:,} members")

    def read(member: str, limit: int) -> bytes:
        start, size = places[member]
        with open(archive, "rb") as file:
            file.seek(start)
            return file.read(min(size, limit + 1))

    return _Index(read, len(places))


_archives = _Archives()
