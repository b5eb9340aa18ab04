"""Time the data pipeline without a model: records -> tokens -> packed rows -> batches.

    python tools/bench_data.py --tokenizer DIRECTORY data/demo/train.jsonl
    python tools/bench_data.py --tokenizer DIRECTORY --type text --stage PT corpus.jsonl
    python tools/bench_data.py --pictures 24 --size 1920x1080

"opening" finds and checks every record. "encoding" turns records into tokens and labels in one process, a second being
one of processor time, so that other work on the machine disturbs it little: what one worker does on a processor of its
own. "loader" is the whole pipeline with `packing: True` and `dataloader_num_workers: N`, by the clock and with the
start of the workers: the speed at which batches are ready, hence the fastest that a run could train. Medians over the
rounds, with the slowest and the fastest.

With `--pictures N`, N generated JPEG files of one size become patches within the published bounds of pixels: "headers"
reads their sizes, "decoding" and its parts are of processor time in one process, a MB being one of patches, and "one
worker" is what arrives from a worker process by the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erniekit.config import Config, load
from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import Template, load_template
from erniekit.data.chat.tokenizer import Tokenizer, load_tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.vision.decode import MediaDecoder
from erniekit.data.vision.images import load_picture, patchify, resize
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.video import DEFAULT_OPTIONS

RECORDS = 2000  # that are encoded alone


def configuration(args: argparse.Namespace) -> Config:
    """The keys that the pipeline reads, with everything else at its default."""
    return load(
        None,
        {
            "model_name_or_path": args.tokenizer,
            "output_dir": "unused",
            "train_dataset_path": str(args.data),
            "train_dataset_type": args.type,
            "stage": args.stage,
            "max_seq_len": args.seq,
            "packing": True,
            "batch_size": args.batch,
            "dataloader_num_workers": args.workers,
            "max_steps": args.steps,
        },
        "train",
    )


def one_round(cfg: Config, tokenizer: Tokenizer, template: Template | None) -> dict[str, float]:
    """Speeds by what they are of."""
    started = time.perf_counter()
    with build_loader(cfg, tokenizer, template=template) as loader:
        opening = time.perf_counter() - started
        records = [loader.dataset.record(number) for number in range(min(len(loader.dataset), RECORDS))]
        encoder = Encoder(tokenizer, template, cfg.max_seq_len)
        encoding = time.process_time()
        documents = [document for record in records for document in encoder(*record).documents]
        encoded, started = time.process_time(), time.perf_counter()
        for _ in range(cfg.max_steps):
            loader.next_step()
        seconds, counts = time.perf_counter() - started, loader.report()
    tokens = sum(len(document.ids) for document in documents)
    return {
        "opening, records/s": len(loader.dataset) / opening,
        "encoding, samples/s": len(records) / (encoded - encoding),
        "encoding, tokens/s": tokens / (encoded - encoding),
        "loader, samples/s": counts["samples"] / seconds,
        "loader, tokens/s": counts["tokens"] / seconds,
    }


def write_pictures(directory: Path, count: int, size: str) -> list[str]:
    """Names of JPEG files with smooth colours and some detail."""
    random = np.random.default_rng(0)
    width, height = (int(side) for side in size.split("x"))
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        coarse = random.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(directory / name, quality=90)
    return names


def timed(function: Callable[[Any], Any], items: Sequence[Any]) -> tuple[list[Any], float]:
    """What a function makes of each item, and seconds of processor time."""
    began = time.process_time()
    results = [function(item) for item in items]
    return results, max(time.process_time() - began, 1e-9)


def picture_round(directory: Path, names: Sequence[str]) -> dict[str, float]:
    """Speeds by what they are of."""
    reader = MediaReader(directory)
    parts = [{"type": "image", "image": name} for name in names]
    began = time.process_time()
    plans = plan_media(parts, reader, ProcessorSettings(), DEFAULT_OPTIONS)
    headers = max(time.process_time() - began, 1e-9)
    megabytes = sum(plan.geometry.patches for plan in plans) * 588 / 1e6
    pictures, loading = timed(lambda name: load_picture(name, reader), names)
    resized, resizing = timed(
        lambda pair: resize(*pair), [(p, q.geometry) for p, q in zip(pictures, plans, strict=True)]
    )
    _, cutting = timed(lambda pixels: patchify(pixels[None]), resized)
    decoding = loading + resizing + cutting
    decoder = MediaDecoder(num_workers=1)
    list(decoder.results(plans[:1]))  # the worker has started
    began = time.perf_counter()
    for _ in decoder.results(plans):
        pass
    seconds = time.perf_counter() - began
    decoder.stop()
    return {
        "headers, pictures/s": len(names) / headers,
        "decoding, pictures/s": len(names) / decoding,
        "decoding, MB/s": megabytes / decoding,
        "  reading files, %": 100 * loading / decoding,
        "  resizing, %": 100 * resizing / decoding,
        "  making patches, %": 100 * cutting / decoding,
        "one worker, pictures/s": len(names) / seconds,
        "one worker, MB/s": megabytes / seconds,
    }


def show(rounds: Sequence[dict[str, float]]) -> None:
    """The median of each speed with its range."""
    for name in rounds[0]:
        values = [speeds[name] for speeds in rounds]
        print(f"{name:>22}: {statistics.median(values):9,.0f}  ({min(values):,.0f} to {max(values):,.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="a data file")
    parser.add_argument("--tokenizer", help="a directory with a tokenizer's files")
    parser.add_argument("--pictures", type=int, help="time this number of generated pictures")
    parser.add_argument("--size", default="1920x1080", help="width and height of the pictures")
    parser.add_argument("--type", default="erniekit")
    parser.add_argument("--stage", default="SFT")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.pictures:
        with tempfile.TemporaryDirectory() as directory:
            names = write_pictures(Path(directory), args.pictures, args.size)
            rounds = [picture_round(Path(directory), names) for _ in range(args.rounds)]
        print(f"{args.pictures} JPEG files of {args.size} pixels")
        show(rounds)
        return
    if args.data is None or args.tokenizer is None:
        parser.error("give a data file and --tokenizer, or --pictures")
    cfg, tokenizer = configuration(args), load_tokenizer(args.tokenizer)
    template = None if args.type == "text" else load_template(tokenizer)
    rounds = [one_round(cfg, tokenizer, template) for _ in range(args.rounds)]
    print(f"{args.data}: {args.steps} steps of {args.batch} x {args.seq} tokens, workers: {args.workers}")
    show(rounds)


if __name__ == "__main__":
    main()
