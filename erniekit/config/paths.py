"""The one place that makes paths of the keys that are paths."""

import os
import re
from typing import Literal

from erniekit.config.values import join_list, split_list

# What a path key holds: nothing of the kind, one path, paths with commas between them, or words of which some are paths
# ("0.3 ~/a 0.7 ~/b").
PathKind = Literal["", "one", "commas", "words"]

_VARIABLE = re.compile(r"\$(?P<name>[A-Za-z_]\w*)", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(text: str, kind: PathKind = "one") -> str:
    """The text of a path key with ~ and ~user replaced by home directories.

    ValueError for what cannot be meant as a path: a home directory that does not exist, an unbraced $NAME, a URL, a
    line break.
    """
    if kind == "commas":
        return join_list([_expand(part) for part in split_list(text)])
    if kind == "words":
        # Commas and white space both separate, and stay as they were.
        return "".join(part if part.isspace() or part == "," else _expand(part) for part in _words(text))
    return _expand(text)


def _words(text: str) -> list[str]:
    return [part for part in re.split(r"(\s|,)", text) if part]


def _expand(path: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError(f"a path without line breaks and control characters is needed, got {path!r}")
    if _URL.match(path):
        raise ValueError(f"{path} is a URL, not a path on this machine. Download it or mount it, and give its path")
    variable = _VARIABLE.search(path)
    if variable:
        name = variable["name"]
        raise ValueError(f"{path}: ${name} is not replaced here. Write ${{{name}}} for the environment variable {name}")
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/", 1)[0]
        raise ValueError(f"{path}: there is no home directory for {user}. For a file of that name write ./{path}")
    return expanded
