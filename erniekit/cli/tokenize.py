"""`erniekit tokenize`: text becomes token files (prefix.bin and prefix.idx) for `dataset_type: pretrain`.

A record of a .jsonl file ({"text": ...} or {"tgt": [...]}) and a whole .txt file is a document; the tokenizer's end
token is put behind each. Stopped or killed, the same command continues where it was, and the files come out the same,
byte for byte, as in one go and with any number of workers.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erniekit import hub
from erniekit.cli.commands import COMMANDS
from erniekit.config.paths import expand
from erniekit.config.values import to_bool, to_float, to_int
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.tokens import build
from erniekit.utils.errors import ConfigError

USAGE = f"usage: {COMMANDS['tokenize'].syntax}"


def run(args: list[str]) -> int:
    """Make the token files of one command line, or finish those that were interrupted, and return the exit code."""
    inputs, options = parse(args)
    started = time.monotonic()
    files = build.find_inputs(inputs)
    tokenizer = load_tokenizer(hub.resolve_model(options.pop("tokenizer"), key="tokenizer"))
    prefix = Path(options.pop("output"))
    done = build.build_token_files(files, prefix, tokenizer, **options)
    skipped = f", {done.skipped} bad records skipped" if done.skipped else ""
    print(
        f"{prefix}.bin and .idx: {done.documents} documents, {done.tokens} tokens{skipped}, from "
        f"{done.read / 1e6:.1f} MB in {time.monotonic() - started:.1f} s"
    )
    return 0


def parse(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The input paths, and the options under the names of build.build_token_files, with tokenizer and output.

    Raises:
        ConfigError: something is missing, unknown, or of the wrong type.
    """
    options: dict[str, Any] = {}
    inputs = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg.startswith("--") and "=" not in arg and rest:
            arg = f"{arg}={rest.pop(0)}"
        name, equals, value = arg.removeprefix("--").partition("=")
        if equals and name in _OPTIONS:
            to, read = _OPTIONS[name]
            options[to] = _value(name, value, read)
        elif arg.startswith("--") or (equals and not Path(arg).exists()):
            raise ConfigError(f"{arg}: `erniekit tokenize` knows {', '.join(_OPTIONS)}\n{USAGE}")
        else:
            inputs.append(_value("the input", arg, expand))
    for name in ("tokenizer", "output"):
        if name not in options:
            raise ConfigError(f"{name}: needed\n{USAGE}")
    if not inputs:
        raise ConfigError(f"expected .jsonl or .txt files, or directories of them\n{USAGE}")
    return inputs, options


def _value(name: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}\n{USAGE}") from None


def _workers(text: str) -> int:
    number = to_int(text)
    if number < 0:
        raise ValueError(f"must be 0 (this process alone) or more, got {text}")
    return number


def _seconds(text: str) -> float:
    number = to_float(text)
    if number < 0:
        raise ValueError(f"must be at least 0 seconds, got {text}")
    return number


def _error_or_skip(text: str) -> str:
    if text not in ("error", "skip"):
        raise ValueError(f"expected error or skip, got {text!r}")
    return text


# Name on the command line -> parameter, and how its text is read.
_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "tokenizer": ("tokenizer", expand),
    "output": ("output", expand),
    "workers": ("num_workers", _workers),
    "append_eos": ("append_eos", to_bool),
    "on_bad_line": ("on_bad_line", _error_or_skip),
    "overwrite": ("overwrite", to_bool),
    "note_every": ("note_every", _seconds),
}
