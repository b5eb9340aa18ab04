"""Finds the data files at a path and separates them from files that are evidently something else."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from erniekit.utils.errors import DataError
from erniekit.utils.user_files import LFS_POINTER

EXTENSIONS = (".json", ".jsonl", ".txt", ".csv", ".parquet")
# description files of Hub data sets
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# names of texts for people: README.txt, LICENSE-2.0.txt, requirements.txt
_NAMES = "read[-_ ]?me|licen[cs]e|notice|copying|change[-_ ]?log|citation|authors|contributing|requirements"
_FOR_PEOPLE = re.compile(rf"({_NAMES})([-_. ].*)?\.txt", re.IGNORECASE)
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")  # how compressed files end
_TABLES = (".xlsx", ".xls", ".ods", ".tsv")  # how spreadsheets, and their tables in other forms, end
_TABLE_HINT = "save the table as .csv in UTF-8, with commas between the cells"
FORM_BYTES = 64  # that tell a file of another form
_LOOKED_AT = 65536  # bytes of a .txt file that are read to see whether its lines begin like JSON
# first bytes of a compressed file, or one of another form -> (what it is, what to do)
_OTHER_FORMS = {
    LFS_POINTER: (
        "a pointer of Git LFS in place of the file",
        "run `git lfs pull` where it was cloned, or download it again",
    ),
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
    """The data files at `path`, which is a file or a directory (searched recursively, in sorted order), and the other
    files there: those with other extensions, descriptions of data sets, texts for people, files that are not regular
    and, unless `with_prose`, .txt files of plain text.
    """
    if not path.is_dir():
        _check_file(path, extensions, with_prose)
        return [path], []
    everything = _walk(path)
    of_arrow = {p.with_name("state.json") for p in everything if p.suffix == ".arrow"}
    named = [p for p in everything if p.suffix.lower() in extensions and p.is_file() and not is_for_people(p)]
    data = [p for p in named if (with_prose or not is_prose(p)) and p not in of_arrow]
    if not data:
        raise _no_data(path, everything, extensions, bool(named), bool(of_arrow))
    chosen = set(data)
    return data, [p for p in everything if p not in chosen]


def refuse_packed(other_files: Sequence[Path], extensions: Sequence[str] = EXTENSIONS) -> None:
    """Raise DataError for a compressed data file among the files of a directory that are not read, since its records
    would be missing; one that was unpacked beside it is fine.
    """
    for path in other_files:
        unpacked = path.with_suffix("")
        if path.suffix.lower() in _PACKED and unpacked.suffix.lower() in extensions and not unpacked.exists():
            raise DataError(
                f"{path}: compressed, so that its directory would be read without it. Hint: unpack it first, or move "
                "it to another directory."
            )


def first_names(names: Sequence[str]) -> str:
    """The first three of several names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _no_data(
    path: Path, everything: Sequence[Path], extensions: Sequence[str], has_prose: bool, has_arrow: bool
) -> DataError:
    """The error of a directory without data files, of what it has instead."""
    hint = "`erniekit tokenize` makes token files of plain text" if has_prose else "look for a typing mistake"
    if any(_is_table(p, extensions) for p in everything):
        hint = _TABLE_HINT
    if has_arrow:
        hint = "what save_to_disk of `datasets` wrote is not read: write it with to_parquet or to_json instead"
    listing = f" (it has {', '.join(p.name for p in everything[:3])})" if everything else ""
    return DataError(
        f"{path}: no data file in this directory{listing}. Hint: a data file ends in {', '.join(extensions)} and "
        f"holds records; {hint}."
    )


def _is_table(path: Path, extensions: Sequence[str]) -> bool:
    """Whether a file is a table that could be read if it were saved as .csv."""
    return path.suffix.lower() in _TABLES and ".csv" in extensions


def _check_file(path: Path, extensions: Sequence[str], with_prose: bool) -> None:
    check_regular(path)
    if path.suffix.lower() not in extensions:
        hint = "rename it after what it holds"
        if path.suffix.lower() in _PACKED:
            hint = "unpack it first"
        elif _is_table(path, extensions):
            hint = _TABLE_HINT
        raise DataError(f"{path}: a data file ends in {', '.join(extensions)}. Hint: {hint}.")
    if not with_prose and is_prose(path):
        with open(path, "rb") as file:
            check_form(path, file.read(FORM_BYTES))
        raise DataError(
            f"{path}: plain text, where one JSON object a line is expected. Hint: `erniekit tokenize` makes token "
            'files of it (dataset_type: pretrain); or write lines {"text": ...}.'
        )


def _walk(path: Path) -> list[Path]:
    """Every file below a directory, except for hidden files and files in hidden directories."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}. Hint: check its permissions.")

    paths: list[Path] = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # links are not followed, but listed
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        paths += [Path(folder, name) for name in [*files, *links] if not name.startswith(".")]
    return sorted(paths)


def is_for_people(path: Path) -> bool:
    """Whether a file in a data directory is, by its name, a description of the data or a text for people."""
    return path.name in _DESCRIPTIONS or _FOR_PEOPLE.fullmatch(path.name) is not None


def is_prose(path: Path) -> bool:
    """Whether a .txt file is plain text: neither its first line nor most of its lines begin like JSON."""
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
    """Raise DataError for a pipe, a device and the like, since opening one could block forever and a run reads its data
    more than once. The same holds for a file that cannot be inspected.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Hint: check the path.") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file. Hint: write the data into a file; it is read more than once.")


def check_form(path: Path, begin: bytes) -> None:
    """Raise DataError if a text file begins like a compressed file or one of another form."""
    for magic, (description, hint) in _OTHER_FORMS.items():
        if begin.startswith(magic):
            raise DataError(f"{path}: {description}, whatever its name says. Hint: {hint}.")
