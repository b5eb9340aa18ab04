"""Expands the values of keys that are paths, when they are read."""

import os
import re

_VARIABLE = re.compile(r"\$(?P<name>[A-Za-z_]\w*)", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux


def expand(path: str) -> str:
    """The path with ~ and ~user replaced by home directories.

    Raises ValueError for a text that cannot be intended as a path: a home directory that does not exist, an unbraced
    $NAME, a URL, a line break, a name that no file can have.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError(f"a path without line breaks and control characters is needed, got {path!r}")
    if _URL.match(path):
        raise ValueError(f"{path} is a URL, not a path on this machine. Download it or mount it, and give its path")
    variable = _VARIABLE.search(path)
    if variable:
        name = variable["name"]
        raise ValueError(f"{path}: ${name} is not replaced here. Write ${{{name}}} for the environment variable {name}")
    _check_length(path)
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/", 1)[0]
        raise ValueError(f"{path}: there is no home directory for {user}. For a file of that name write ./{path}")
    return expanded


def _check_length(path: str) -> None:
    """Raise ValueError for what every access to the path would refuse, with other errors in other places."""
    names = [len(os.fsencode(name)) for name in path.split("/")]
    for size, most, what in ((max(names), _LONGEST_NAME, "name"), (sum(names) + len(names) - 1, _LONGEST_PATH, "path")):
        if size > most:
            raise ValueError(f"{path[:40]}...: a {what} of {size} bytes is too long: at most {most} are possible")
