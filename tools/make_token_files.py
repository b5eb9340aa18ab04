"""Tokenise text into token files (prefix.bin and prefix.idx) for `dataset_type: pretrain`.

    python tools/make_token_files.py --tokenizer examples/models/tiny-moe --output corpus/a corpus/*.jsonl
    python tools/make_token_files.py --tokenizer my_model --output corpus/a --workers 8 corpus_dir

A line of .jsonl ({"text": ...} or {"tgt": [...]}) and a whole .txt file is a document; the tokenizer's end token is put
behind each. Stopped or killed, the same command goes on where it was, and the files come out the same, byte for byte,
as in one go and with any number of workers.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.tokens import build
from erniekit.utils import log
from erniekit.utils.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help=".jsonl and .txt files, or directories of them")
    parser.add_argument("--tokenizer", required=True, help="a directory with the model's tokenizer files")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise; 0: none but this one")
    parser.add_argument("--no-eos", action="store_true", help="do not put the end token behind each document")
    parser.add_argument("--on-bad-line", choices=("error", "skip"), default="error", help="skip: pass over and count")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, also an unfinished build")
    parser.add_argument("--note-every", type=float, default=5.0, help="seconds of work that a kill may cost")
    return parser.parse_args(given)


class Display:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        columns = (
            TextColumn("tokenising"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("MB, {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, transient=True)
        self._task = self._bar.add_task("", total=None, rate="")
        self._started = self._said = time.monotonic()
        self._first: build.Progress | None = None

    def __enter__(self) -> "Display":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, done: build.Progress, total: int) -> None:
        now = time.monotonic()
        self._first = self._first or done
        rate = f"{(done.tokens - self._first.tokens) / max(now - self._started, 1e-3) / 1e6:.2f} M tokens/s"
        if self._bar.console.is_terminal:
            self._bar.update(self._task, total=total // 10**6, completed=done.read // 10**6, rate=rate)
        elif now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            log.info(f"{done.read / 1e6:.0f} of {total / 1e6:.0f} MB, {done.documents} documents, {rate}")


def main() -> None:
    args = arguments()
    if args.workers < 0:
        sys.exit("error: --workers must be 0 or more")
    started = time.monotonic()
    try:
        tokenizer = load_tokenizer(args.tokenizer)
        with Display() as display:
            done = build.build_token_files(
                build.find_inputs(args.inputs),
                Path(args.output).expanduser(),
                tokenizer,
                num_workers=args.workers,
                append_eos=not args.no_eos,
                on_bad_line=args.on_bad_line,
                overwrite=args.overwrite,
                note_every=args.note_every,
                show=display.show,
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    skipped = f", {done.skipped} bad records skipped" if done.skipped else ""
    print(
        f"{args.output}.bin and .idx: {done.documents} documents, {done.tokens} tokens{skipped}, from "
        f"{done.read / 1e6:.1f} MB in {time.monotonic() - started:.1f} s"
    )


if __name__ == "__main__":
    main()
