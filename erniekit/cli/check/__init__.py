"""`erniekit check`: what a run would find wrong, and what it would do, in seconds and without a GPU or weights."""

import json
from pathlib import Path

from erniekit import config
from erniekit.cli import launch
from erniekit.cli.check import data, model, output, settings
from erniekit.cli.check.report import Report
from erniekit.config import Config
from erniekit.config.paths import expand
from erniekit.config.values import to_bool
from erniekit.utils import atomic
from erniekit.utils.errors import ConfigError

COMMANDS = ("train", "eval", "export", "split", "chat")
USAGE = "usage: erniekit check CONFIG.yaml [key=value ...] [command=train] [strict=true] [json=OUT.json]"


def run(args: list[str]) -> int:
    """Check a configuration, print what was found and return the exit code."""
    options, rest = read_options(args)
    strict = _strict(options["strict"])
    report = inspect(rest, options["command"])
    print(report.to_text())
    if options["json"]:
        text = json.dumps(report.to_dict(strict), ensure_ascii=False, indent=2) + "\n"
        atomic.write_text(Path(expand(options["json"])), text)
    return report.exit_code(strict)


def read_options(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of `check` itself, and the arguments of the command that is checked.

    Raises:
        ConfigError: an option has a value that it does not take, or there is nothing to check.
    """
    options = {"command": "train", "strict": "false", "json": ""}
    rest = []
    for arg in args:
        name, equals, value = arg.removeprefix("--").partition("=")
        if equals and name in options:
            options[name] = value
        else:
            rest.append(arg)
    if options["command"] not in COMMANDS:
        raise ConfigError(f"command={options['command']}: expected one of {', '.join(COMMANDS)}\n{USAGE}")
    if not rest:
        raise ConfigError(f"Missing configuration files. Give a YAML or JSON file, or --key value.\n{USAGE}")
    return options, rest


def _strict(text: str) -> bool:
    try:
        return to_bool(text)
    except ValueError as error:
        raise ConfigError(f"strict: {error}\n{USAGE}") from None


def inspect(args: list[str], command: str = "train") -> Report:
    """What can be said about a command line of `command` before it runs."""
    report = Report(command)
    cfg = _load(report, args, command)
    if cfg is None:
        return report
    facts = model.inspect(report, cfg, command)
    steps = data.inspect(report, cfg, command, facts)
    if command == "train":
        output.inspect(report, cfg, facts, steps)
    return report


def _load(report: Report, args: list[str], command: str) -> Config | None:
    section = report.section("keys")
    cfg: Config | None = None
    with section.collecting():
        path, overrides = launch.read_arguments(args)
        cfg = config.load(path, overrides, command, allow_extra=launch.allows_extra())
    if cfg is not None:
        settings.inspect(section, cfg, command)
    return cfg
