"""`erniekit webui`: the board in the browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from erniekit.cli import options
from erniekit.config.paths import expand


def run(args: list[str]) -> int:
    """Show the board until it is interrupted. Raises ConfigError for an option that it does not have."""
    values, others = options.read("webui", args, _OPTIONS)
    options.require("webui", not others, f"{' '.join(others)}: the options are {', '.join(_OPTIONS)}")
    from erniekit.board.server import serve

    directory = values.pop("runs", Path("runs"))
    serve(directory, **values)
    return 0


def _directory(text: str) -> Path:
    path = Path(expand(text))
    if not path.is_dir():
        raise ValueError("expected directories that exist, with commas between them")
    return path


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port <= 65535:
        raise ValueError("expected a port, 0 (a free one) to 65535")
    return port


def _each(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: tuple(read(item.strip()) for item in text.split(","))


_OPTIONS: options.Readers = {
    "runs": lambda text: Path(expand(text)),
    "host": str,
    "port": _port,
    "allow": _each(_directory),
    "allowed_hosts": _each(str),
    "api_key_file": expand,
}
