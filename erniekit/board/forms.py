"""The form of a configuration. Its text is what counts: the form shows the values of the text and changes its lines, so
that comments, other names of keys and keys without a field stay as they are.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from erniekit import config
from erniekit.board.runs import Runs
from erniekit.config import reference, schema
from erniekit.config.read import MAX_BYTES
from erniekit.utils.errors import ConfigError, UserError

_FIELDS = schema.fields()
_KEY = re.compile(r"\s*([A-Za-z_]\w*): ")


def groups(command: str, docs: Mapping[str, str]) -> list[dict[str, Any]]:
    """The fields of a command's form: name and fields of each group of keys, in the schema's order. `docs` are
    translated lines of documentation by key; the others stay in English.
    """
    return [
        {"name": name, "fields": [_field(entry, docs.get(entry.name, entry.doc)) for entry in entries]}
        for name, entries in reference.by_group(command).items()
    ]


def _field(entry: reference.KeyEntry, doc: str) -> dict[str, Any]:
    choices = list(_FIELDS[entry.name].metadata["choices"]) if "item" not in _FIELDS[entry.name].metadata else []
    if entry.type == "switch":
        choices = ["True", "False"]
    return {**vars(entry), "doc": doc, "choices": [choice for choice in choices if choice]}


def values(text: str) -> dict[str, str]:
    """The values that a text gives to keys of the schema, as a field shows them. Raises UserError if it is no YAML."""
    return {key.value: _shown(node) for key, node in _leaves(_root(text)) if key.value in _FIELDS}


def change(text: str, name: str, value: str) -> str:
    """The text with another value of a key; without the key where `value` is empty. Raises UserError if the text is no
    YAML, or has a form in which lines cannot be changed.
    """
    if name not in _FIELDS:
        raise UserError(f"{name[:80]}: unknown key")
    root = _root(text)
    line = f"{name}: {_written(name, value.strip())}"
    found = next(((key, node) for key, node in _leaves(root) if key.value == name), None)
    if root is not None and root.flow_style and text.strip():
        raise UserError("this file is written in braces; change its text, or load another one.")
    if found is None:
        return text if not value.strip() else text + ("\n" if text and not text.endswith("\n") else "") + line + "\n"
    begin, end = found[0].start_mark.index, _end(found[1])
    if value.strip():
        return text[:begin] + line + text[end:]
    begin = text.rfind("\n", 0, begin) + 1
    after = text.find("\n", end)
    return text[:begin] + ("" if after < 0 else text[after + 1 :])


def check(text: str, command: str, runs: Runs, words: Sequence[str] = ()) -> dict[str, Any]:
    """What `config.load` says about a text: `problems` by key, those of no key under "", `notes`, and its
    `output_dir`, references followed.
    """
    problems: dict[str, list[str]] = {}
    notes: list[str] = []
    output = None
    with draft(text, runs) as path:
        try:
            cfg = config.load(str(path), list(words), command)
            notes, output = list(cfg.notes), cfg.output_dir
            config.require_supported(cfg, command)
            said: Sequence[str] = _outside(cfg, runs)
        except ConfigError as error:
            said = error.problems or (str(error),)
        for line in [_unnamed(str(path), each) for each in said]:
            key = _KEY.match(line)
            problems.setdefault(key[1] if key and key[1] in _FIELDS else "", []).append(line)
        notes = [_unnamed(str(path), note) for note in notes]
        return {"problems": problems, "notes": notes, "output_dir": output}


def _unnamed(path: str, line: str) -> str:
    """A message about a draft without the name of its file."""
    return re.sub(re.escape(path) + r":(?=\d)", "line ", line).replace(f"{path}: ", "").replace(path, "the YAML")


@contextlib.contextmanager
def draft(text: str, runs: Runs) -> Iterator[Path]:
    """A context with a file that holds a text, below the root of the runs. Raises UserError for a text that names
    environment variables, whose values a page must not show, and for one that is too long.
    """
    if len(text.encode()) > MAX_BYTES:
        raise UserError(f"the YAML has more than {MAX_BYTES} bytes.")
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=runs.root) as directory:
        path = Path(directory) / "draft.yaml"
        path.write_text(text, encoding="utf-8")
        names = []
        with contextlib.suppress(ConfigError):  # what is wrong with the text is said by what reads it
            names = config.environment_variables(str(path))
        if names:
            raise UserError(f"${{{names[0]}}}: the board reads no environment variables. Write the value.")
        yield path


def require_inside(path: Path, command: str, runs: Runs) -> None:
    """Raises UserError for a file with paths that leave the directories of the board. Of one that cannot be loaded the
    command says what is wrong, and reads nothing else.
    """
    with contextlib.suppress(ConfigError):
        lines = _outside(config.load(str(path), (), command, allow_extra=True), runs)
        if lines:
            raise UserError("\n".join(lines))


def _outside(cfg: config.Config, runs: Runs) -> list[str]:
    """A line for each path that leaves the directories of the board. Names of a Hub stay below the working directory,
    like any relative path.
    """
    lines = []
    for name, field in _FIELDS.items():
        value = vars(cfg)[name]
        paths = value if isinstance(value, tuple) else (value,)
        if field.metadata["path"]:
            lines += [
                f"{name}: {path} is not below a directory that the board may use. Start it with allow=DIRECTORY."
                for path in paths
                if path and not runs.is_below(path)
            ]
    return lines


def _root(text: str) -> yaml.MappingNode | None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the text is not YAML: {' '.join(str(error).split())[:300]}") from None
    if root is None or isinstance(root, yaml.MappingNode):
        return root
    raise UserError("the text is not YAML with lines `key: value`.")


def _leaves(node: yaml.Node | None, depth: int = 0) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys of a text, those within blocks included, with their values."""
    if not isinstance(node, yaml.MappingNode) or depth > 8:
        return
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, depth + 1)
        elif isinstance(key, yaml.ScalarNode):
            yield key, value


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        items = [_shown(item) for item in node.value]
        if all(isinstance(item, yaml.ScalarNode) and not set(item.value) & set(",[]\"'") for item in node.value):
            return ", ".join(items)
        return "[" + ", ".join(json.dumps(item, ensure_ascii=False) for item in items) + "]"
    return str(node.value)


def _end(node: yaml.Node) -> int:
    """The index after a value. A block ends after its last item: its own mark is after the comments that follow."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _written(name: str, value: str) -> str:
    """A value as YAML: as it stands where YAML reads just that, else quoted."""
    if "item" in _FIELDS[name].metadata and value.startswith("["):
        return value
    node = None
    with contextlib.suppress(UserError):
        node = next((node for _, node in _leaves(_root(f"{name}: {value}"))), None)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.value == value and "\n" not in value
    return value if plain else json.dumps(value, ensure_ascii=False)
