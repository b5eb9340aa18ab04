"""Supervised fine-tuning on short samples: erniekit against TRL's SFTTrainer, in one run on this machine.

    python tools/bench_sft.py
    python tools/bench_sft.py --config examples/models/tiny-moe --batches 8 --rounds 15

Both sides are the real trainers with their data pipelines, on the same samples (tokenised by erniekit's template, so
the tokens and the labels are the same) and the same architecture, from a random start, in processes of their own that
take turns of some optimizer steps. What counts is useful tokens per second: tokens of the samples, padding left out,
over the time of the turn.

    ours      packed rows of max_seq_len tokens, no padding; as many rows as hold the tokens of TRL's batch
    trl       SFTTrainer with the defaults of SFTConfig: padded batches, gradient checkpointing, bf16 autocast
    trl-fp32  the same in fp32 without gradient checkpointing, which suits a CPU better
    ours-bf16 as ours, with matmul_precision: bf16; only if asked for (--against trl trl-fp32 ours-bf16)

Needs the extra `parity` (torch, transformers, trl, and the datasets package that trl brings).
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_worker import PAUSE, Worker, serve

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "trl", "trl-fp32", "ours-bf16")
_FOREVER = 1_000_000  # optimizer steps: the parent ends the worker, not the trainer
_WARMUP = 5


class Gate:
    """Stands in a trainer's callback and lets it run only when it is told to: a number of steps a command."""

    def __init__(
        self, commands: Iterator[Any], answer: Callable[[dict[str, Any]], None], about: dict[str, Any]
    ) -> None:
        self.commands, self.answer = commands, answer
        self.left, self.reply = _WARMUP, about
        self.counts = np.zeros(3, dtype=np.int64)  # tokens, supervised tokens, cells of the batch
        self.begin = 0.0

    def step(self) -> None:
        """A step is done. Does not return until another one is wanted; ends the process when none will be."""
        self.left -= 1
        if self.left:
            return
        seconds = time.perf_counter() - self.begin
        self.answer(self.reply | {"seconds": seconds, "counts": self.counts.tolist()})
        self.reply = {}
        command = next(self.commands, None)
        if command is None:
            sys.stderr.flush()
            os._exit(0)  # neither trainer need save anything
        self.left = command
        self.counts[:] = 0
        self.begin = time.perf_counter()


def run_ours(
    job: dict[str, Any], commands: Iterator[Any], answer: Callable[[dict[str, Any]], None], matmul_precision: str
) -> None:
    """erniekit's trainer."""
    sys.path.insert(0, str(ROOT))
    from erniekit.utils import runtime

    runtime.prepare()  # as the command does, before the first import of paddle
    from erniekit import config
    from erniekit.parallel.mesh import Mesh
    from erniekit.precision import policy
    from erniekit.training.build import build_run
    from erniekit.training.callbacks import Callback, StepMetrics
    from erniekit.training.trainer import Trainer

    cfg = config.load(
        None,
        {
            "model_name_or_path": job["model"],
            "continue_training": False,
            "stage": "SFT",
            "train_dataset_type": "erniekit",
            "train_dataset_path": job["samples"],
            "output_dir": f"{job['output']}/ours-{matmul_precision}",
            "max_steps": _FOREVER,
            "max_seq_len": job["max_seq_len"],
            "packing": True,
            "batch_size": job["rows"],
            "learning_rate": 2e-5,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        command="train",
    )
    run = build_run(cfg, Mesh.single())
    parameters = sum(int(np.prod(p.shape)) for p in run.model.parameters())
    gate = Gate(commands, answer, {"parameters": parameters, "threads": runtime.set_threads()})

    class Turns(Callback):
        def on_step(self, metrics: StepMetrics) -> None:
            gate.counts += [metrics.num_tokens, metrics.num_supervised, metrics.num_tokens]
            gate.step()

    with policy.products(matmul_precision, "cpu"):
        Trainer(run, [Turns()]).fit()


def run_trl(job: dict[str, Any], commands: Iterator[Any], answer: Callable[[dict[str, Any]], None], fp32: bool) -> None:
    """TRL's SFTTrainer on tokenised samples."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job["threads"])
    fields = json.loads((Path(job["model"]) / "config.json").read_text())
    fields.pop("architectures", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(job["model"]) / "tokenizer.json"), pad_token="<unk>", eos_token="</s>"
    )
    columns = json.loads(Path(job["tokens"]).read_text())
    overrides: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False} if fp32 else {}
    arguments = SFTConfig(
        output_dir=job["output"] + "/trl",
        max_steps=_FOREVER,
        per_device_train_batch_size=job["batch"],
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **overrides,
    )
    gate = Gate(commands, answer, {"parameters": sum(p.numel() for p in model.parameters())})

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step()

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        tokens, supervised = batch["attention_mask"].sum().item(), (batch["labels"] != -100).sum().item()
        gate.counts += [tokens, supervised, batch["input_ids"].numel()]
        return batch

    trainer.data_collator = counted
    trainer.train()


def serve_side(side: str) -> None:
    """The worker."""
    commands, answer = serve()
    job = next(commands)
    if side.startswith("ours"):
        run_ours(job, commands, answer, matmul_precision="bf16" if side == "ours-bf16" else "fp32")
    else:
        run_trl(job, commands, answer, fp32=side == "trl-fp32")


def tokenise(samples: Path, model: Path, max_seq_len: int) -> dict[str, list[list[int]]]:
    """`input_ids` and `labels` (not shifted, as TRL takes them) of every sample, through erniekit's own template."""
    sys.path.insert(0, str(ROOT))
    from erniekit.data.chat.encode import Encoder
    from erniekit.data.chat.template import load_template
    from erniekit.data.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    encode = Encoder(tokenizer, load_template(tokenizer), max_seq_len)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number, line in enumerate(samples.read_bytes().splitlines(), 1):
        for ids, labels, *_ in encode("erniekit", line, f"{samples.name}:{number}").documents:
            # Our labels are shifted: the last one is the token after the document's last.
            columns["input_ids"].append([*ids.tolist(), int(labels[-1])] if labels[-1] >= 0 else ids.tolist())
            shifted = [-100, *labels.tolist()]
            columns["labels"].append(shifted if labels[-1] >= 0 else shifted[:-1])
    return columns


def report(job: dict[str, Any], workers: list[Worker], turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the table of one batch size and give its numbers."""
    about = workers[0].about
    print(
        f"\n{Path(job['model']).name}, {about['parameters'] / 1e6:.2f} M parameters; TRL batches of {job['batch']} "
        f"samples, ours of {job['rows']} x {job['max_seq_len']} packed; {job['threads']} threads, "
        f"{len(turns['ours'])} rounds, load {os.getloadavg()[0]:.2f}"
    )
    heads = ("useful tok/s", 13), ("(min-max)", 16), ("supervised/s", 13), ("tok/step", 10), ("padding", 9)
    print(" " * 9 + "".join(head.rjust(width) for head, width in (*heads, ("step ms", 9), ("peak MB", 9))))
    speeds = {side: [turn["counts"][0] / turn["seconds"] for turn in done] for side, done in turns.items()}
    result: dict[str, Any] = {"batch": job["batch"], "rows": job["rows"], "useful_tokens_per_second": {}, "ratios": {}}
    for worker in workers:
        done, speed = turns[worker.side], speeds[worker.side]
        tokens, supervised, cells = np.sum([turn["counts"] for turn in done], axis=0)
        seconds, steps = sum(turn["seconds"] for turn in done), sum(turn["steps"] for turn in done)
        result["useful_tokens_per_second"][worker.side] = statistics.median(speed)
        print(
            f"{worker.side:9}{statistics.median(speed):13.0f}{f'{min(speed):.0f}-{max(speed):.0f}':>16}"
            f"{supervised / seconds:13.0f}{tokens / steps:10.0f}{1 - tokens / cells:9.0%}"
            f"{1e3 * seconds / steps:9.1f}{worker.peak_mb:9.0f}"
        )
    for own, side in itertools.product(("ours", "ours-bf16"), turns):
        if own not in turns or side.startswith("ours"):
            continue
        ratios = [mine / other for mine, other in zip(speeds[own], speeds[side], strict=True)]
        ratio = statistics.median(ratios)
        result["ratios"][side if own == "ours" else f"{own} / {side}"] = ratio
        print(f"{own} / {side}: {ratio:.2f} (rounds {min(ratios):.2f}-{max(ratios):.2f})", flush=True)
    return result | {"peak_mb": {worker.side: worker.peak_mb for worker in workers}}


def bench(job: dict[str, Any], against: list[str], rounds: int) -> dict[str, Any]:
    """Take turns at one batch size."""
    workers: list[Worker] = []
    for side in ("ours", *against):
        workers.append(Worker(__file__, side, job))
        job = job | {"threads": workers[0].about["threads"]}  # torch gets as many as erniekit took
    # Turns of about a second and a half.
    steps = {w.side: max(3, min(300, round(1.5 / (w.ask(5)["seconds"] / 5)))) for w in workers}
    turns: dict[str, list[dict[str, Any]]] = {worker.side: [] for worker in workers}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            time.sleep(PAUSE)
            turns[worker.side].append(worker.ask(steps[worker.side]) | {"steps": steps[worker.side]})
    result = report(job, workers, turns)
    for worker in workers:
        worker.close()
    return result


def main() -> None:
    """Parse the command line and run every batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "examples/models/tiny-dense", help="a model directory")
    parser.add_argument("--samples", type=Path, default=ROOT / "data/demo/train.jsonl", help="in the erniekit format")
    parser.add_argument("--num-samples", type=int, default=8000)
    parser.add_argument("--max-seq-len", type=int, default=256, help="of erniekit's packed rows")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8, 64], help="samples of a TRL batch; 8 is its default"
    )
    parser.add_argument(
        "--against", nargs="*", choices=SIDES[1:], default=SIDES[1:3], help="the sides beside ours; none: ours alone"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    with tempfile.TemporaryDirectory() as directory, open(args.samples, "rb") as lines:
        samples, tokens = Path(directory) / "samples.jsonl", Path(directory) / "tokens.json"
        samples.write_bytes(b"".join(itertools.islice(lines, args.num_samples)))
        columns = tokenise(samples, args.config, args.max_seq_len)
        tokens.write_text(json.dumps(columns))
        mean = float(np.mean([len(ids) for ids in columns["input_ids"]]))
        job = {"model": str(args.config), "samples": str(samples), "tokens": str(tokens), "output": directory}
        job |= {"max_seq_len": args.max_seq_len}
        results = []
        for batch in args.batches:
            rows = max(1, round(batch * mean / args.max_seq_len))
            results.append(bench(job | {"batch": batch, "rows": rows}, args.against, args.rounds))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
