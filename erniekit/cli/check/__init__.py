"""`erniekit check`: reports in seconds what is wrong with a run and what it would do, without a GPU or weights."""

import json
from pathlib import Path
from typing import Any

from erniekit import config
from erniekit.cli import launch, options
from erniekit.cli.check import data, device, exported, model, output, settings
from erniekit.cli.check.report import Report
from erniekit.config import Config
from erniekit.config.values import to_bool
from erniekit.utils import atomic

MAX_PREVIEWED = 1000


def run(args: list[str]) -> int:
    """Check a configuration, print the findings and return the exit code."""
    values, command_args = read_options(args)
    strict = values["strict"]
    records = Path(values["records"]) if values["records"] else None
    chosen = data.CheckOptions(values["decode"], values["preview"], Path(values["sheet"]), values["first"], records)
    report = inspect(command_args, values["command"], chosen)
    print(report.to_text())
    if values["json"]:
        text = json.dumps(report.to_dict(strict), ensure_ascii=False, indent=2) + "\n"
        atomic.write_text(Path(values["json"]), text)
    return report.exit_code(strict)


def read_options(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of `check` itself, and the arguments of the command that is checked.

    Raises:
        ConfigError: an option has a value that it does not accept, or there is nothing to check.
    """
    values, command_args = options.read("check", args, _OPTIONS)
    options.require("check", command_args, "Missing configuration files. Give a YAML or JSON file, or --key value.")
    defaults = {"command": "train", "strict": False, "json": "", "decode": False, "preview": 0, "sheet": "preview.png"}
    defaults |= {"first": 1, "records": ""}
    return defaults | values, command_args


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else -1
    if not 0 <= count <= MAX_PREVIEWED:
        raise ValueError(f"expected a number of records from 0 to {MAX_PREVIEWED}")
    return count


def _number(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 10**12:
        raise ValueError("expected the number of a record, from 1 on")
    return number


_OPTIONS: options.Readers = {
    "command": options.one_of("train", "eval", "export", "split", "chat", "server"),
    "strict": to_bool,
    "json": options.new_file,
    "decode": to_bool,
    "preview": _count,
    "sheet": options.new_file,
    "first": _number,
    "records": options.new_file,
}


def inspect(args: list[str], command: str = "train", options: data.CheckOptions = data.DEFAULT_OPTIONS) -> Report:
    """The report on a command line of `command`, made without running it."""
    report = Report(command)
    cfg = _load(report, args, command)
    if cfg is None:
        return report
    if command == "train":
        device.inspect(report, cfg)
    facts = model.inspect(report, cfg, command)
    steps = data.inspect(report, cfg, command, facts, options)
    if command == "train":
        output.inspect(report, cfg, facts, steps)
    elif command == "export" and not report.count("error"):
        exported.inspect(report, cfg)
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
