"""`erniekit convert`: change weights between the Hugging Face ("-PT") and the Paddle layout, in either direction."""

import sys

from erniekit.cli.commands import COMMANDS
from erniekit.config.paths import expand
from erniekit.utils.errors import ConfigError

FORMATS = ("pt", "paddle")
USAGE = f"usage: {COMMANDS['convert'].syntax}"


def run(args: list[str]) -> int:
    """Convert one model directory into another and return the exit code."""
    source, target, layout, shard_gb, overwrite = parse(args)
    from erniekit.export import convert

    convert.convert(source, target, format=layout, max_shard_size=f"{shard_gb:g}GB", overwrite=overwrite)
    return 0


def parse(args: list[str]) -> tuple[str, str, str, float, bool]:
    """Read source directory, target directory, layout, shard size in GB, and whether another model may be replaced.

    Raises:
        ConfigError: something is missing, unknown, or not a number.
    """
    options = {"format": "", "max_shard_size": "5", "overwrite": "false"}
    places = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg.startswith("--") and "=" not in arg and rest:
            arg = f"{arg}={rest.pop(0)}"
        name, equals, value = arg.removeprefix("--").partition("=")
        if equals and name in options:
            options[name] = value
        elif equals or arg.startswith("--"):
            raise ConfigError(f"{arg}: `erniekit convert` knows format, max_shard_size and overwrite\n{USAGE}")
        else:
            places.append(arg)
    if len(places) != 2:
        raise ConfigError(f"expected a source and a target directory, got {len(places)}\n{USAGE}")
    if options["format"] not in FORMATS:
        raise ConfigError(f"format={options['format']}: expected one of {', '.join(FORMATS)}\n{USAGE}")
    if options["overwrite"].lower() not in ("true", "false"):
        raise ConfigError(f"overwrite={options['overwrite']}: expected true or false\n{USAGE}")
    overwrite = options["overwrite"].lower() == "true"
    try:
        source, target = (expand(place) for place in places)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return source, target, options["format"], _gigabytes(options["max_shard_size"]), overwrite


def _gigabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < sys.float_info.max:
        raise ConfigError(f"max_shard_size={text}: expected a number of GB greater than 0, such as 5 or 0.5\n{USAGE}")
    return number
