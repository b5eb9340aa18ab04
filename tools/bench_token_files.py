"""Time `erniekit tokenize` against its tokenizer alone, over the same text, in turns.

    python tools/bench_token_files.py --tokenizer examples/models/tiny-moe corpus.jsonl
    python tools/bench_token_files.py --tokenizer examples/models/tiny-moe --rounds 5 --workers 0 1 2 -- corpus.jsonl

"alone" is one process that calls tokenizer.encode_plain on every document, read and parsed beforehand. The command
reads, parses, tokenises and writes; its time includes the start of its worker processes, but not of Python itself.
Processor time is that of all its processes. Ratios are of the fastest rounds, which a busy machine disturbs least.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from erniekit.data.chat.tokenizer import Tokenizer, load_tokenizer
from erniekit.data.records.formats import parse_record
from erniekit.data.records.readers import load_record
from erniekit.data.tokens import build


def read_texts(inputs: list[Path]) -> list[str]:
    lines = [line for path in inputs for line in path.read_bytes().splitlines() if line.strip()]
    return [parse_record(load_record(line, "text"), "text", "text").text for line in lines]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the clock, and of processors by this process and its ended children."""
    before, started = os.times(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def alone(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        tokenizer.encode_plain(text)


def with_command(tokenizer: Tokenizer, inputs: list[Path], workers: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        build.build_token_files(inputs, Path(directory) / "out", tokenizer, workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help=".jsonl files")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    tokenizer, texts = load_tokenizer(args.tokenizer), read_texts(args.inputs)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ways: dict[str, Callable[[], None]] = {"alone": lambda: alone(tokenizer, texts)}
    for n in args.workers:
        ways[f"{n} workers"] = lambda n=n: with_command(tokenizer, args.inputs, n)  # type: ignore[misc]
    times = {name: [] for name in ways}  # type: dict[str, list[tuple[float, float]]]
    for _ in range(args.rounds):
        for name, work in ways.items():
            times[name].append(timed(work))
    best = {name: [min(column) for column in zip(*rounds, strict=True)] for name, rounds in times.items()}
    print(f"{len(texts)} documents, {megabytes:.1f} MB of text, {args.rounds} rounds")
    wall_alone, processor_alone = (max(value, 1e-3) for value in best["alone"])  # a tiny input takes no time
    for name, (seconds, processor) in best.items():
        print(
            f"{name:>10}: {seconds:6.2f} s, {megabytes / seconds:5.2f} MB/s, ratio {seconds / wall_alone:.2f}; "
            f"processor {processor:6.2f} s, ratio {processor / processor_alone:.2f}"
        )


if __name__ == "__main__":
    main()
