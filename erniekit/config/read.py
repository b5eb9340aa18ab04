"""Reads a YAML or JSON file, and key=value or --key value words, into entries that record where each key was given."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.config import yaml_tree
from erniekit.config.paths import expand
from erniekit.config.values import Scalar
from erniekit.config.yaml_tree import Pairs
from erniekit.utils import user_files
from erniekit.utils.errors import ConfigError

MAX_BYTES = 1 << 20  # of a configuration file
_BLOCK_ENDINGS = ("_args", "_config", "_arguments")
_COMMAND_LINE = "command line"  # the place of an entry
# Mappings of ERNIE's pretraining files that group keys under other names.
_BLOCKS = ("fp8_mem_configs", "fp8_fused_ops_configs")
_JSON_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:')
_OVERRIDE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_.]*)=", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One key as the user gave it: its value, its place ("x.yaml:12", "command line") and its block, if any.

    A value is None, text, a Scalar (a number or truth value as written), a number or truth value (from Python or JSON),
    or a list or dict of these.
    """

    name: str
    value: Any
    place: str
    block: str = ""


def is_block(name: str, known: Callable[[str], bool]) -> bool:
    """Whether a mapping under this name only groups keys (training_args:, lora_config: ...) and is not a key itself."""
    return name in _BLOCKS or (name.endswith(_BLOCK_ENDINGS) and not known(name))


def read_file(path: str, known: Callable[[str], bool]) -> list[Entry]:
    """The entries of a .yaml, .yml or .json file, with blocks flattened. Raises ConfigError with the line number."""
    try:
        file = Path(expand(path))
    except ValueError as error:
        raise ConfigError(f"configuration file: {error}") from None
    suffix = file.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            f"{path}: Config file only supports Yaml/Json/Arguments. Give a .yaml or .json, then key=value."
        )
    try:
        text = user_files.decode(user_files.read_bytes(file, ConfigError, MAX_BYTES), path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file (looked in {Path.cwd()}). The shipped files are under examples/configs/."
        ) from None
    pairs = _json_pairs(path, text) if suffix == ".json" else yaml_tree.read_mapping(text, path)
    return list(_flatten(pairs, known))


def read_overrides(given: "Sequence[str] | Mapping[str, Any] | None", known: Callable[[str], bool]) -> list[Entry]:
    """The entries of `key=value` and `--key value` words (a later one wins), or of a mapping (Python callers)."""
    if not given:
        return []
    if isinstance(given, Mapping):
        return list(_flatten(_nested(given, lambda name: "overrides"), known))
    if isinstance(given, str):
        raise ConfigError(f"overrides: expected a list of key=value words, got the text {given!r}")
    last: dict[str, Entry] = {}
    for name, value, place in _words(list(given), known):
        last |= {entry.name: entry for entry in _dotted(name, value, place, known)}
    return list(last.values())


def _words(words: list[str], known: Callable[[str], bool]) -> Iterable[tuple[str, Any, str]]:
    """The name, value and place of each word, or of several that belong together."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.removeprefix("--").partition("=")[0].strip():
            raise ConfigError(f"{word!r} names no key. Example: max_steps=100")
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            values = [text] if equals else []
            while not equals and position < len(words) and not _begins(words[position], bool(values), known):
                values.append(words[position])
                position += 1
            if not values:
                yield name, True, f"{_COMMAND_LINE}: a switch without a value"  # --packing
            else:
                yield name, _value(values[0]) if len(values) == 1 else [_value(item) for item in values], _COMMAND_LINE
        elif "=" in word:
            name, _, text = word.partition("=")
            yield name.strip(), _value(text), _COMMAND_LINE
        else:
            raise ConfigError(
                f"{word!r} is neither key=value nor --key value. Example: max_steps=100, without spaces around ="
            )


def _begins(word: str, has_value: bool, known: Callable[[str], bool]) -> bool:
    """Whether a word after `--key` begins another key. Its first value may look like key=value (`--output_dir a=b`),
    unless there is a key of that name.
    """
    match = _OVERRIDE.match(word)
    return word.startswith("--") or bool(match and (has_value or known(match["name"].rpartition(".")[2])))


def _value(text: str) -> Any:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"command line: {text!r} is not UTF-8 text.") from None
    return _plain(yaml_tree.read_value(text))


def _dotted(name: str, value: Any, place: str, known: Callable[[str], bool]) -> Iterable[Entry]:
    """What a dotted name gives: training_args.seed=3 and training_args={seed: 3} mean seed=3; env.x=1 is a mapping."""
    first, *rest = name.split(".")
    block = ""
    while rest and is_block(first, known):
        block, first, *rest = first, *rest
    for part in reversed(rest):
        value = {part: value}
    if value is None:  # an empty block is a line of a file that may be kept, but no word that does anything
        return [Entry(first, value, place, block)]
    return _flatten(_nested({first: value}, lambda name: place), known, block)


def _plain(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {name: _plain(inner) for name, inner, _ in value.items}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _flatten(pairs: Pairs, known: Callable[[str], bool], block: str = "") -> Iterable[Entry]:
    for name, value, place in pairs.items:
        if is_block(name, known) and (isinstance(value, Pairs) or value is None):
            if value is not None:
                yield from _flatten(value, known, name)
        else:
            yield Entry(name, _plain(value), place, block)


def _nested(mapping: Mapping[str, Any], place: Callable[[str], str]) -> Pairs:
    items = [(str(name), value) for name, value in mapping.items()]
    return Pairs([(name, _nested(v, place) if isinstance(v, Mapping) else v, place(name)) for name, v in items])


def _json_pairs(path: str, text: str) -> Pairs:
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty.")
    tree = user_files.parse_json(text, path, ConfigError, number=Scalar)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {user_files.kind(tree)}.")
    lines = _key_lines(text)
    return _nested(tree, lambda name: f"{path}:{lines[name]}" if lines.get(name) else path)


def _key_lines(text: str) -> dict[str, int]:
    """The line of each key of a JSON text; 0 for a key that occurs in several objects."""
    lines: dict[str, int] = {}
    line, position = 1, 0
    for key in _JSON_KEY.finditer(text):
        line, position = line + text.count("\n", position, key.start()), key.start()
        lines[key[1]] = 0 if key[1] in lines else line
    return lines
