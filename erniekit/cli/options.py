"""Options of a command that are not keys of a configuration: `name=value`, `--name=value` or `--name value`."""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from erniekit.cli.commands import COMMANDS
from erniekit.config.paths import expand
from erniekit.config.schema import fields
from erniekit.utils.errors import ConfigError

# Option -> function that parses its text; a ValueError says what is wrong with the text.
Readers = Mapping[str, Callable[[str], Any]]
_CLOSE = 0.8  # from this difflib ratio on, a word counts as a misspelt option


def read(command: str, args: list[str], readers: Readers) -> tuple[dict[str, Any], list[str]]:
    """The values of the options of `command`, and the other arguments unchanged.

    Raises:
        ConfigError: an option has no value, or one that its reader does not accept; or an argument is neither a key nor
            an option, and resembles one.
    """
    values: dict[str, Any] = {}
    arguments: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        is_named = bool(equals) or word.startswith("--")
        if name not in readers or not is_named:
            near = difflib.get_close_matches(name, readers, n=1, cutoff=_CLOSE)
            if near and is_named and name not in fields():
                raise _wrong(command, f"{_not_one_of(word, command, readers)}; did you mean {near[0]}?")
            arguments.append(word)
            continue
        if not equals:
            text = next(words, "")
        if not text:
            raise _wrong(command, f"{name}: a value is missing")
        try:
            values[name] = readers[name](text)
        except ValueError as error:
            raise _wrong(command, f"{name}={text}: {error}") from None
    return values, arguments


def read_with_paths(command: str, args: list[str], readers: Readers) -> tuple[dict[str, Any], list[str]]:
    """Like `read`, for a command whose other arguments are paths.

    Raises:
        ConfigError: as for `read`, and for an option that the command does not have.
    """
    values, paths = read(command, args, readers)
    for word in paths:
        if not word.strip():
            raise _wrong(command, "a path is empty; perhaps a variable in it is not set")
        if word.startswith("--") or ("=" in word and not Path(word).exists()):
            raise _wrong(command, _not_one_of(word, command, readers))
    try:
        return values, [expand(word) for word in paths]
    except ValueError as error:
        raise _wrong(command, str(error)) from None


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser for an option with a fixed set of values."""

    def read_word(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return read_word


def new_file(text: str) -> str:
    """A parser for the path of a file that the command writes; its directory must exist and be writable. Writing
    replaces what has the name, and /dev/null or a link such as /dev/stdout must not become a file.
    """
    path = Path(expand(text))
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir():
        raise ValueError(f"expected a file to be written, in a directory that exists ({directory})")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError("a link or a device, which the file would replace; name a new or a regular file")
    if not os.access(directory, os.W_OK | os.X_OK):  # asked now, since a command writes at its end
        raise ValueError(f"not allowed to write in {directory}; change its permissions, or name another directory")
    return str(path)


def require(command: str, condition: object, message: str) -> None:
    """Raise ConfigError with `message` and the usage of `command` unless `condition` holds."""
    if not condition:
        raise _wrong(command, message)


def _not_one_of(word: str, command: str, readers: Readers) -> str:
    return f"{word}: the options of `erniekit {command}` are {', '.join(readers)}"


def _wrong(command: str, message: str) -> ConfigError:
    return ConfigError(f"{message}\nusage: {COMMANDS[command].syntax}")
