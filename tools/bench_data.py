"""Time the data pipeline without a model: records -> tokens -> packed rows -> batches.

    python tools/bench_data.py --tokenizer DIRECTORY data/demo/train.jsonl
    python tools/bench_data.py --tokenizer DIRECTORY --type text --stage PT corpus.jsonl

"opening" finds and checks every record. "encoding" turns records into tokens and labels in one process, a second being
one of processor time, so that other work on the machine disturbs it little: what one worker does on a processor of its
own. "loader" is the whole pipeline with `packing: True` and `dataloader_num_workers: N`, by the clock and with the
start of the workers: the speed at which batches are ready, hence the fastest that a run could train. Medians over the
rounds, with the slowest and the fastest.
"""

import argparse
import statistics
import time
from pathlib import Path

from erniekit.config import Config, load
from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import Template, load_template
from erniekit.data.chat.tokenizer import Tokenizer, load_tokenizer
from erniekit.data.loader import build_loader

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data file")
    parser.add_argument("--tokenizer", required=True, help="a directory with a tokenizer's files")
    parser.add_argument("--type", default="erniekit")
    parser.add_argument("--stage", default="SFT")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cfg, tokenizer = configuration(args), load_tokenizer(args.tokenizer)
    template = None if args.type == "text" else load_template(tokenizer)
    rounds = [one_round(cfg, tokenizer, template) for _ in range(args.rounds)]
    print(f"{args.data}: {args.steps} steps of {args.batch} x {args.seq} tokens, workers: {args.workers}")
    for name in rounds[0]:
        values = [speeds[name] for speeds in rounds]
        print(f"{name:>20}: {statistics.median(values):9,.0f}  ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    main()
