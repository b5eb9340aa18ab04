"""Which files at a path are data, and which are evidently something else that lies beside them."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from erniekit.utils.errors import DataError

EXTENSIONS = (".json", ".jsonl", ".txt", ".csv", ".parquet")
# what Hub data sets keep beside their data
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# a text for people, by its name: README.txt, LICENSE-2.0.txt, requirements.txt
_NAMES = "read[-_ ]?me|licen[cs]e|notice|copying|change[-_ ]?log|citation|authors|contributing|requirements"
_FOR_PEOPLE = re.compile(rf"({_NAMES})([-_. ].*)?\.txt", re.IGNORECASE)
_LOOKED_AT = 65536  # bytes of a .txt file, to see whether its lines begin as JSON does
# how a file begins that is compressed or in another form -> what it is, and what to do
_OTHER_FORMS = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it first (gunzip)"),
    b"BZh": ("compressed with bzip2", "unpack it first (bunzip2)"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unpack it first (unxz)"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it first (unzstd)"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the table as .csv"),
    b"PAR1": ("a parquet file", "name it .parquet"),
    b"ARROW1": ("an Arrow file", "save it as .parquet or .jsonl"),
    b"\xff\xfe": ("UTF-16 text", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save the file as UTF-8"),
}


def find_files(
    path: Path, extensions: Sequence[str] = EXTENSIONS, with_prose: bool = False
) -> tuple[list[Path], list[Path]]:
    """The data files at `path`, itself a file or a directory searched to its depth in sorted order, and the files there
    that are not data: by their extension, a description of a data set, a text for people, what is no regular file, and,
    unless `with_prose`, .txt files of plain text.
    """
    if not path.is_dir():
        _check_file(path, extensions)
        return [path], []
    everything = _walk(path)
    named = [p for p in everything if p.suffix.lower() in extensions and p.is_file() and not is_for_people(p)]
    data = [p for p in named if with_prose or not is_prose(p)]
    if not data:
        others = f" (it has {', '.join(p.name for p in everything[:3])})" if everything else ""
        hint = "`erniekit tokenize` makes token files of plain text" if named else "look for a typing mistake"
        raise DataError(
            f"{path}: no data file in this directory{others}. Hint: a data file ends in {', '.join(extensions)} and "
            f"holds records; {hint}."
        )
    chosen = set(data)
    return data, [p for p in everything if p not in chosen]


def _check_file(path: Path, extensions: Sequence[str]) -> None:
    check_regular(path)
    if path.suffix.lower() not in extensions:
        is_packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip")
        hint = "unpack it first" if is_packed else "rename it after what it holds"
        raise DataError(f"{path}: a data file ends in {', '.join(extensions)}. Hint: {hint}.")


def _walk(path: Path) -> list[Path]:
    """Every file below a directory but hidden ones and those in hidden directories."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}. Hint: check its permissions.")

    paths: list[Path] = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # not followed, but named
        paths += [Path(folder, name) for name in [*files, *links] if not name.startswith(".")]
    return sorted(paths)


def is_for_people(path: Path) -> bool:
    """Whether a file in a directory of data is a description or a text for people, by its name."""
    return path.name in _DESCRIPTIONS or _FOR_PEOPLE.fullmatch(path.name) is not None


def is_prose(path: Path) -> bool:
    """Whether a .txt file is plain text: its first line does not begin as JSON does, nor do most of its lines."""
    if path.suffix.lower() != ".txt":
        return False
    try:
        with open(path, "rb") as file:
            begin = file.read(_LOOKED_AT)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Hint: check its permissions.") from None
    lines = [line.strip() for line in begin.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    is_json = [line.startswith((b"{", b"[")) for line in lines if line]
    return bool(is_json) and not is_json[0] and sum(is_json) <= len(is_json) / 2


def check_regular(path: Path) -> None:
    """DataError for a pipe, a device and the like, and for a file that cannot be looked at: opening one could wait for
    ever, and a run reads its data more than once.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Hint: check the path.") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file. Hint: write the data into a file; it is read more than once.")


def check_form(path: Path, begin: bytes) -> None:
    """DataError if a text file begins as a compressed file does, or as one of another form."""
    for magic, (what, hint) in _OTHER_FORMS.items():
        if begin.startswith(magic):
            raise DataError(f"{path}: {what}, whatever its name says. Hint: {hint}.")
