"""`erniekit help` and `erniekit version`: they do not import Paddle, so they answer at once and without it."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import erniekit
from erniekit.cli.commands import ALIASES, COMMANDS
from erniekit.utils.errors import ConfigError

if TYPE_CHECKING:
    from erniekit.config.compat import Detail, Fixed, Later, NoEffect
    from erniekit.config.reference import KeyEntry

USAGE = """\
erniekit trains ERNIE 4.5 models on PaddlePaddle. It is an independent project, not Baidu's official ERNIEKit.
Nothing here has run on a GPU yet: its tests run on CPUs.

usage: erniekit COMMAND CONFIG.yaml [key=value ...]
       erniekit COMMAND --key value [--key value ...]

CONFIG is a YAML or JSON file with flat keys; key=value replaces one of them for this run.
`erniekit help train` lists the keys. In a checkout, after `make demo`, the command is .venv/bin/erniekit.

commands:
{commands}"""

CONFIGURED = """\
erniekit {name} CONFIG.yaml [key=value ...]
       erniekit {name} --key value [--key value ...]"""


def help(args: list[str]) -> int:
    """Print the general usage, the usage of the command named in `args`, or the meaning of the key named there."""
    if len(args) > 1:
        raise ConfigError(f"`erniekit help` takes the name of one command or key, but got: {' '.join(args)}")
    print(usage(ALIASES.get(args[0], args[0])) if args else usage())
    return 0


def usage(name: str | None = None) -> str:
    """The usage text of all commands, or of one; or what a key means.

    Raises:
        ConfigError: there is no command and no key of that name.
    """
    if name is None:
        rows = (f"  {key:<9}{command.summary}\n{'':<11}{command.example}" for key, command in COMMANDS.items())
        return USAGE.format(commands="\n".join(rows))
    if name not in COMMANDS:
        return _key_usage(name)
    command = COMMANDS[name]
    syntax = command.syntax or CONFIGURED.format(name=name)
    text = f"erniekit {name}: {command.summary}\n\nusage: {syntax}\nexample: {command.example}"
    if command.options:
        text += "\n\noptions, with their defaults:\n" + "\n".join(f"  {line}" for line in command.options)
    return text + keys(name) if command.takes_config or name == "train" else text


def _key_usage(name: str) -> str:
    """What a key means, or what is done here with a key of ERNIEKit's or PaddleFormers' files."""
    from erniekit.config import reference, schema, synonyms  # imported late, as below
    from erniekit.config.compat import Alias
    from erniekit.config.compat_keys import RULES

    field, rule = schema.fields().get(name), RULES.get(name)
    if field is None and isinstance(rule, Alias):
        return f"  {name}: another name of {rule.to}.\n{_key_usage(rule.to)}"
    if field is None:
        if rule is not None and not isinstance(rule, Alias):
            return textwrap.fill(f"  {name}: {_foreign(rule)}", 118, subsequent_indent="      ")
        near = nearest(name)
        hint = f"did you mean {near}?" if near else synonyms.hint(name, schema.fields())
        in_brackets = f" ({hint})" if hint else ""
        raise ConfigError(f"there is no command and no key named {name!r}{in_brackets}; `erniekit help` lists commands")
    listed = {command: reference.by_group(command) for command in reference.KEYS}
    readers = [
        command
        for command, groups in listed.items()
        if any(entry.name == name for entries in groups.values() for entry in entries)
    ]
    group = textwrap.fill(f"Group: {reference.key_doc(name)}", 118, initial_indent="      ", subsequent_indent="      ")
    lines = [_key_lines(reference.entry(field)), f"      Read by: {', '.join(readers)}.", group]
    for key, value, stages in reference.method_defaults():
        if key == name:
            lines.append(f"      Default with stage {stages}: {value}.")
    return "\n".join(lines)


def _foreign(rule: "NoEffect | Detail | Later | Fixed") -> str:
    """What is done with a key that files of ERNIEKit or PaddleFormers may have and that is none here."""
    from erniekit.config.compat import Detail, Fixed, NoEffect

    known = "a key of ERNIEKit or PaddleFormers"
    if isinstance(rule, NoEffect):
        return f"{known}, accepted without effect: {rule.why}"
    if isinstance(rule, Detail):
        return f"{known}, accepted without effect: it is read only with {rule.of}, which this version does not have"
    if isinstance(rule, Fixed):
        values = ", ".join(map(str, rule.only)) or "null"
        return f"{known}; any value but {values} is refused: {rule.why}"
    return f"{known}; a value that asks for it is refused: {rule.feature}"


def nearest(name: str) -> str | None:
    """The command whose name is most similar to `name`; None if there is no similar one."""
    import difflib

    return next(iter(difflib.get_close_matches(name, COMMANDS, n=1)), None)


def keys(command: str) -> str:
    """The keys that a command reads, by group, each with its default, its limits and its documentation."""
    from erniekit.config import reference  # imported late: it needs PyYAML, the general usage does not

    lines = []
    for group, entries in reference.by_group(command).items():
        lines += ["", f"{group}:", *map(_key_lines, entries)]
    if command == "train":
        lines += ["", "other defaults with some stages:"]
        lines += [f"  {key}: {value} with stage: {stages}" for key, value, stages in reference.method_defaults()]
    return "\n".join(["", "", "keys, with their defaults and limits:", *lines])


def _key_lines(entry: "KeyEntry") -> str:
    text = f"{entry.name} ({entry.default}{entry.limits and f'; {entry.limits}'}): {entry.doc}"
    return textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)


def version(args: list[str]) -> int:
    """Print the box with the version and the commit."""
    if args:
        raise ConfigError(f"`erniekit version` takes no arguments, but got: {' '.join(args)}")
    lines = ["Welcome to ErnieKit", f"version : {erniekit.__version__}", f"commit  : {commit()}"]
    width = max(len(line) for line in lines)
    edge = "+-" + "-" * width + "-+"
    print("\n".join([edge, *(f"| {line:<{width}} |" for line in lines), edge]))
    return 0


def commit() -> str:
    """The commit of the checkout that contains this package, with ".dirty" if tracked files differ; else "unknown"."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    import subprocess

    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=12", "--exclude=*"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return completed.stdout.strip() or "unknown"
