"""Full fine-tuning against LoRA, also on a base in few bits: time of a step, peak memory, size of a checkpoint.

    python tools/bench_lora.py                                  # 100 M parameters, full and lora
    python tools/bench_lora.py --model 0.3B --sides full lora "lora wint8" "lora wint4"
    python tools/bench_lora.py --rank 32 --batch 4 --seq 512

One causal-LM step in fp32 on random tokens with a label at every position, AdamW, gradients clipped. Each side is a
process of its own, and they take turns: on a shared machine, trust the ratio, not the milliseconds. Peak memory is the
process's, loading included. A checkpoint is what a run writes to go on: weights or adapter, and AdamW's state.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import PRESETS, _dense
from bench_worker import PAUSE, Worker, serve

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"100M": PRESETS["small"][0], "0.3B": _dense(18, 1024, (16, 2), 3072, 103424) | {"head_dim": 128}}
SIDES = ("full", "lora", "lora wint8", "lora wint4", "lora wint4/8", "lora nf4")


def make_base(directory: str, config: dict[str, Any]) -> None:
    """The base model at random, in bfloat16, as published models are; in a process of its own."""
    import erniekit
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.models.init import init_weights

    model = CausalLM(ModelConfig.from_dict(config))
    init_weights(model, 0)
    erniekit.save_model(model, directory, dtype="bfloat16")


class Step:
    """One training step of a side."""

    def __init__(self, side: str, job: dict[str, Any]) -> None:
        import paddle

        from erniekit import lora
        from erniekit.build import load_model
        from erniekit.config.schema import Config
        from erniekit.losses.lm import linear_cross_entropy
        from erniekit.models.weights import our_shapes
        from erniekit.parallel.grad_sync import GradientSync
        from erniekit.parallel.zero import ShardedParameters
        from erniekit.precision.quantized_weight import QuantizedWeights
        from erniekit.precision.weight_only import SCHEMES
        from erniekit.training.adamw import AdamW, parameter_rules

        self.paddle, self.loss_of = paddle, linear_cross_entropy
        adapted, _, compute_type = side.partition(" ")
        product = QuantizedWeights(SCHEMES[compute_type]) if compute_type else None
        self.model = model = load_model(job["base"], product=product)
        if adapted == "lora":
            options = lora.LoraOptions(rank=job["rank"], alpha=2.0 * job["rank"])
            lora.attach(model, options, our_shapes(model.config), tied=True)
        model.train()
        named = [(name, p) for name, p in model.named_parameters() if not p.stop_gradient]
        rules = parameter_rules(model, Config(weight_decay=0.01))
        parameters = ShardedParameters.single(named)
        self.sync = GradientSync(parameters)
        self.optimizer = AdamW(parameters, rules, 0.9, 0.999, 1e-8)
        self.trained = sum(int(np.prod(p.shape)) for _, p in named)

    def run(self, ids_BS: np.ndarray, labels_BS: np.ndarray) -> None:
        from erniekit.models.inputs import packed_inputs
        from erniekit.parallel.grad_clip import clip_, global_norm
        from erniekit.parallel.process_group import ALONE

        paddle = self.paddle
        hidden = self.model.model(packed_inputs(self.model, ids_BS, np.ones_like(ids_BS)))
        weights = paddle.full([ids_BS.size], 1.0 / ids_BS.size)
        head = self.model.output_head()
        loss, *_ = self.loss_of(hidden.normed, head, paddle.to_tensor(labels_BS.reshape(-1)), weights)
        loss.backward()
        gradients = self.sync.finish()
        clip_(gradients, global_norm(gradients, self.sync.parameters.entries, ALONE), 1.0)
        self.optimizer.step(gradients, 1e-4)
        self.sync.clear()

    def checkpoint_bytes(self) -> int:
        """Weights or adapter as saved, and the optimizer's state."""
        from erniekit import lora
        from erniekit.checkpoint.model_io import save_model
        from erniekit.checkpoint.peft_attach import save_adapter

        with tempfile.TemporaryDirectory() as directory:
            (save_model if lora.state_of(self.model) is None else save_adapter)(self.model, directory)
            files = sum(file.stat().st_size for file in Path(directory).iterdir())
        state = self.optimizer.state.values()
        return files + sum(4 * int(np.prod(tensor.shape)) for fields in state for tensor in fields.values())


def serve_side(side: str) -> None:
    """The worker: a job, then numbers of steps to run, at last "size"."""
    commands, answer = serve()
    sys.path.insert(0, str(ROOT))
    from erniekit.utils import runtime

    runtime.prepare()  # before the first import of paddle
    job = next(commands)
    runtime.set_threads(job["threads"])
    if side == "base":
        make_base(job["base"], job["config"])
        answer({})
        return
    step, random = Step(side, job), np.random.default_rng(2)

    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            ids, labels = random.integers(0, job["config"]["vocab_size"], (2, job["batch"], job["seq"]))
            started = time.perf_counter()
            step.run(ids, labels)
            seconds.append(time.perf_counter() - started)
        return seconds

    run(2)
    answer({"trained": step.trained})
    for command in commands:
        answer({"bytes": step.checkpoint_bytes()} if command == "size" else {"seconds": run(command)})


def main() -> None:
    """Parse the command line, run all sides in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="100M")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["full", "lora"], help="the first is the measure")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of each side (default: what erniekit takes by itself)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    job = {"config": MODELS[args.model], "rank": args.rank, "batch": args.batch, "seq": args.seq}
    job["threads"] = args.threads
    with tempfile.TemporaryDirectory() as base:
        job["base"] = base
        Worker(__file__, "base", job).close()
        workers = [Worker(__file__, side, job) for side in args.sides]
    medians: dict[str, list[float]] = {worker.side: [] for worker in workers}
    for number in range(args.rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            time.sleep(PAUSE)
            medians[worker.side].append(statistics.median(worker.ask(2)["seconds"]))
    batch = f"batch {args.batch} x {args.seq}"
    print(f"{args.model}, rank {args.rank}, {batch}, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    heads = ("", 14), ("trained", 12), ("step ms", 10), (f"of {args.sides[0]}", 10), ("(min-max)", 14)
    print("".join(head.rjust(width) for head, width in (*heads, ("peak MB", 10), ("checkpoint MB", 15))))
    for worker in workers:
        peak, mine = worker.peak_mb, medians[worker.side]
        ratios = [one / first for one, first in zip(mine, medians[args.sides[0]], strict=True)]
        size = worker.ask("size")["bytes"]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{worker.side:14}{worker.about['trained']:12,}{1e3 * statistics.median(mine):10.0f}"
            f"{statistics.median(ratios):10.2f}{spread:>14}{peak:10.0f}{size / 1e6:15.1f}"
        )
        worker.close()


if __name__ == "__main__":
    main()
