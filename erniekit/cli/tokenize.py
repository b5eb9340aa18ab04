"""`erniekit tokenize`: turns text into token files (prefix.bin and prefix.idx) for `dataset_type: pretrain`.

Each record of a .jsonl file ({"text": ...} or {"tgt": [...]}) and each .txt file becomes a document, followed by the
tokenizer's end token. After an interruption the same command continues where it stopped. The files are the same, byte
for byte, with or without interruptions and for any number of workers.
"""

import time
from pathlib import Path
from typing import Any

from erniekit import hub
from erniekit.cli import options
from erniekit.config.paths import expand
from erniekit.config.token_files import checked_prefix
from erniekit.config.values import to_bool, to_float, to_int
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.tokens import build
from erniekit.utils.wording import count_of


def run(args: list[str]) -> int:
    """Make the token files of one command line, or finish those that were interrupted, and return the exit code."""
    inputs, values = parse(args)
    started = time.monotonic()
    files = build.find_inputs(inputs)
    tokenizer = load_tokenizer(hub.resolve_model(values.pop("tokenizer"), key="tokenizer"))
    prefix = Path(values.pop("output"))
    result = build.build_token_files(files, prefix, tokenizer, **values)
    skipped = f", {count_of(result.skipped, 'bad record')} skipped" if result.skipped else ""
    print(
        f"{prefix}.bin and .idx: {count_of(result.documents, 'document')}, "
        f"{count_of(result.tokens, 'token')}{skipped}, from {result.read / 1e6:.1f} MB in "
        f"{time.monotonic() - started:.1f} s"
    )
    return 0


def parse(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The input paths, and the options under the names of build.build_token_files, with tokenizer and output.

    Raises:
        ConfigError: something is missing, unknown, or of the wrong type.
    """
    values, inputs = options.read_with_paths("tokenize", args, _OPTIONS)
    for name in ("tokenizer", "output"):
        options.require("tokenize", name in values, f"{name}: needed")
    options.require("tokenize", inputs, "expected .jsonl or .txt files, or directories of them")
    if "workers" in values:
        values["num_workers"] = values.pop("workers")
    return inputs, values


def _workers(text: str) -> int:
    number = to_int(text)
    if number < 0:
        raise ValueError("must be 0 (this process alone) or more")
    return number


def _seconds(text: str) -> float:
    number = to_float(text)
    if number < 0:
        raise ValueError("must be at least 0 seconds")
    return number


_OPTIONS: options.Readers = {
    "tokenizer": expand,
    "output": lambda text: checked_prefix(expand(text)),
    "workers": _workers,
    "append_eos": to_bool,
    "on_bad_line": options.one_of("error", "skip"),
    "overwrite": to_bool,
    "note_every": _seconds,
}
