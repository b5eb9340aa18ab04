"""`erniekit convert`: change weights between the Hugging Face ("-PT") and the Paddle layout, in either direction."""

import sys
from typing import Literal

from erniekit.cli import options
from erniekit.config.values import to_bool, to_gigabytes
from erniekit.utils import stop_signals


def run(args: list[str]) -> int:
    """Convert one model directory into another and return the exit code."""
    source, target, layout, shard_gb, overwrite = parse(args)
    from erniekit.export import convert  # imports Paddle, which replaces signal handlers

    stop_signals.listen()
    convert.convert(source, target, format=layout, max_shard_size=f"{shard_gb}GB", overwrite=overwrite)
    return 0


def parse(args: list[str]) -> tuple[str, str, Literal["pt", "paddle"], float, bool]:
    """The source directory, the target directory, the layout, the shard size in GB, and whether another model may be
    replaced.

    Raises:
        ConfigError: something is missing, unknown, or of the wrong type.
    """
    values, paths = options.read_with_paths("convert", args, _OPTIONS)
    options.require("convert", len(paths) == 2, f"expected a source and a target directory, got {len(paths)}")
    options.require("convert", "format" in values, "format: needed; pt or paddle")
    source, target = paths
    return source, target, values["format"], values.get("max_shard_size", 5.0), values.get("overwrite", False)


def _gigabytes(text: str) -> float:
    number = to_gigabytes(text)
    if not 0 < number < sys.float_info.max:
        raise ValueError("expected a number of GB greater than 0, such as 5 or 0.5")
    return number


_OPTIONS: options.Readers = {
    "format": options.one_of("pt", "paddle"),
    "max_shard_size": _gigabytes,
    "overwrite": to_bool,
}
