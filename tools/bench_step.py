"""Time a full training step of erniekit against torch + transformers, in one run on this machine.

    python tools/bench_step.py                          # presets small, tiny, tinymoe
    python tools/bench_step.py tiny --rounds 15
    python tools/bench_step.py --config examples/models/tiny-moe --batch 8 --seq 256
    python tools/bench_step.py tiny --documents 16      # rows packed with 16 documents each
    python tools/bench_step.py tiny --only ours --profile
    python tools/bench_step.py tiny --before DIRECTORY  # another checkout of erniekit takes turns as well
    python tools/bench_step.py --bf16                   # so do matmul_precision: bf16 and torch's modes in bf16

Both sides do the same work: one causal-LM step in fp32 on random tokens with a label at every position, AdamW,
gradients clipped to a global norm of 1. Each side lives in a process of its own, so that neither sees the other's
threads or allocator, and they take turns (A B, B A, ...), never both at once: on a shared machine, trust the ratio and
its range, not the tokens per second. torch runs on as many threads as erniekit, with transformers' default attention
(sdpa) and default experts; given documents, it gets restarting position_ids and builds its own block-diagonal 4-D mask,
as transformers does for packed rows. erniekit's fused head forms its gradients in the forward pass, so compare sums,
not forward with forward. Processor time ("CPU ms") counts the threads' waiting for one another, except with
--threads 1, where it is the number that a busy machine disturbs least.

Needs the extra `parity` for the torch side; without it, only erniekit is timed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_worker import PAUSE, OurStep, TorchStep, Worker, serve, serve_steps


def _dense(layers: int, size: int, heads: tuple[int, int], ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "ernie4_5",
        "num_hidden_layers": layers,
        "hidden_size": size,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": size // heads[0],
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
    }


_EXPERTS = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 256,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 3,
    "moe_layer_interval": 1,
}
# name -> (config.json, batch, seq)
PRESETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "small": (_dense(12, 768, (12, 4), 2048, 32000), 2, 512),
    "tiny": (_dense(4, 256, (4, 2), 512, 4096), 4, 512),
    "tinymoe": (_dense(4, 256, (4, 2), 512, 4096) | _EXPERTS, 4, 512),
}


def product_flops(config: dict[str, Any], tokens: int, lengths: np.ndarray) -> float:
    """FLOPs of all matrix products of a step, forward and backward: projections, experts that a token goes to, head,
    and the causal half of attention in documents of these lengths. The router's are left out.
    """
    size, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    layers, sparse = config["num_hidden_layers"], 0
    attention = size * dim * 2 * (heads + config["num_key_value_heads"])
    if "moe_num_experts" in config:
        sparse = config["moe_layer_end_index"] - config["moe_layer_start_index"] + 1
    experts = config.get("moe_k", 0) + config.get("moe_num_shared_experts", 0)
    blocks = (layers - sparse) * config["intermediate_size"] + sparse * experts * config.get("moe_intermediate_size", 0)
    weights = layers * attention + 3 * size * blocks + size * config["vocab_size"]
    pairs = (lengths.astype(float) ** 2).sum() / 2
    return 3 * (2 * tokens * weights + layers * 4 * heads * dim * pairs)


def documents_in_row(seq: int, count: int) -> np.ndarray:
    """Segment ids 1..count [seq] of documents of uneven length, the same on both sides."""
    cuts = np.random.default_rng(1).choice(np.arange(1, seq), size=count - 1, replace=False)
    return np.searchsorted(np.sort(cuts), np.arange(seq), side="right") + 1


class _Ours(OurStep):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.segments = np.tile(documents_in_row(job["seq"], job["documents"]), (job["batch"], 1))

    def loss(self, ids_BS: np.ndarray, labels_BS: np.ndarray) -> Any:
        from erniekit.models.inputs import packed_inputs

        # The plan of who sees whom belongs to a batch, so it belongs to the step.
        return self.head_loss(packed_inputs(self.model, ids_BS, self.segments), labels_BS.reshape(-1))


class _Torch(TorchStep):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.positions = None
        if job["documents"] > 1:
            segments = documents_in_row(job["seq"], job["documents"])
            first = np.searchsorted(segments, segments)
            self.positions = self.torch.from_numpy(np.tile(np.arange(job["seq"]) - first, (job["batch"], 1)))

    def build(self, config: dict[str, Any]) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {name: value for name, value in config.items() if name != "architectures"}
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=self.torch.float32
        )

    def loss(self, ids_BS: np.ndarray, labels_BS: np.ndarray) -> Any:
        # `shift_labels`: labels that are already shifted, as ours are, so that every position has one.
        labels = self.torch.from_numpy(labels_BS)
        ids = self.torch.from_numpy(ids_BS)
        return self.model(
            input_ids=ids, position_ids=self.positions, labels=labels, shift_labels=labels, use_cache=False
        ).loss


class _OursBf16(_Ours):
    """With matmul_precision: bf16."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        from erniekit.precision import policy

        self.products = policy.products("bf16", "cpu")
        self.products.__enter__()  # until the process ends


class _TorchAutocast(_Torch):
    """fp32 weights, products in bf16."""

    def loss(self, ids_BS: np.ndarray, labels_BS: np.ndarray) -> Any:
        with self.torch.autocast("cpu", self.torch.bfloat16):
            return super().loss(ids_BS, labels_BS)


class _TorchBf16(_Torch):
    """Weights, activations and moments in bf16, without fp32 masters."""

    def build(self, config: dict[str, Any]) -> Any:
        return super().build(config).to(self.torch.bfloat16)


SIDES = {"ours": _Ours, "torch": _Torch}
IN_16_BITS = {"ours-bf16": _OursBf16, "torch-autocast": _TorchAutocast, "torch-bf16": _TorchBf16}


def serve_side(side: str) -> None:
    """The worker: a job, then numbers of steps to run."""
    commands, answer = serve()
    job = next(commands)
    random = np.random.default_rng(2)
    shape, vocab = (job["batch"], job["seq"]), job["config"]["vocab_size"]

    def next_batch() -> tuple[np.ndarray, np.ndarray]:
        return random.integers(0, vocab, shape), random.integers(0, vocab, shape)

    serve_steps(commands, answer, (SIDES | IN_16_BITS)[side](job), next_batch, job["warmup"], {})


class Side(Worker):
    """A side with the steps it has run: [loss, forward, backward, update, processor time], seconds."""

    def __init__(self, side: str, job: dict[str, Any], script: str) -> None:
        super().__init__(script, side, job)
        self.rows: list[list[float]] = []
        self.rates: list[float] = []  # FLOP/s of a matrix product, beside each turn

    def turn(self, steps: int) -> float:
        """Run some steps; their median time in seconds."""
        rows = self.ask(steps)["rows"]
        self.rows += rows
        return statistics.median(sum(row[1:4]) for row in rows)


def bench(
    name: str,
    job: dict[str, Any],
    sides: list[str],
    rounds: int,
    profile: bool,
    script: str = __file__,
    before: Path | None = None,
) -> dict[str, Any]:
    """Interleave the sides, workers of `script`, for `rounds` rounds and print the table. `before`: another checkout
    of erniekit, whose worker is one more side.
    """
    workers: list[Side] = []
    for side in sides:
        workers.append(Side(side, job, script))
        job = job | {"threads": workers[0].about["threads"]}  # torch gets as many as erniekit took
    if before is not None:
        workers.append(Side("ours", job, str(before / "tools" / Path(script).name)))
        workers[-1].side = "before"
    # A turn takes about a second: long enough to be stable, short enough that the machine is the same for both.
    steps = {w.side: max(2, min(20, round(1.0 / w.turn(2)))) for w in workers}
    for worker in workers:
        worker.rows.clear()
    medians: dict[str, list[float]] = {w.side: [] for w in workers}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            time.sleep(PAUSE)
            medians[worker.side].append(worker.turn(steps[worker.side]))
            if worker.side != "before":
                worker.rates.append(worker.ask("rate")["rate"])
    result = report(name, job, workers, medians)
    for worker in workers:
        if profile:
            worker.ask("profile")
        worker.close()
    return result


def report(name: str, job: dict[str, Any], workers: list[Side], medians: dict[str, list[float]]) -> dict[str, Any]:
    """Print the table of one case and give its numbers. `medians` are the seconds of a step, side -> round by round."""
    tokens = job["batch"] * job["seq"]
    size = workers[0].about["parameters"] / 1e6
    print(
        f"\n{name}: {size:.2f} M parameters, batch {job['batch']} x {job['seq']}, {job['contents']}, "
        f"{workers[0].about['threads']} threads, {len(medians[workers[0].side])} rounds, load {os.getloadavg()[0]:.2f}"
    )
    heads = ("tokens/s", 10), ("(min-max)", 16), ("forward", 10), ("backward", 10), ("update", 9), ("step ms", 9)
    print(
        " " * 8
        + "".join(
            head.rjust(width) for head, width in (*heads, ("CPU ms", 9), ("peak MB", 9), ("GFLOP/s", 9), ("share", 7))
        )
    )
    flops, shares = job.get("flops", float("nan")), dict[str, float]()
    for worker in workers:
        worker.rates = worker.rates or workers[0].rates  # those of another checkout are those of the same Paddle
        times = medians[worker.side]
        forward, backward, update, cpu = (1e3 * statistics.median(row[i] for row in worker.rows) for i in (1, 2, 3, 4))
        shares[worker.side] = statistics.median(
            flops / seconds / rate for seconds, rate in zip(times, worker.rates, strict=True)
        )
        rates = f"{tokens / max(times):.0f}-{tokens / min(times):.0f}"
        print(
            f"{worker.side:8}{tokens / statistics.median(times):10.0f}{rates:>16}{forward:10.1f}{backward:10.1f}"
            f"{update:9.1f}{1e3 * statistics.median(times):9.1f}{cpu:9.1f}{worker.peak_mb:9.0f}"
            f"{statistics.median(worker.rates) / 1e9:9.0f}{shares[worker.side]:7.2f}"
        )
    result: dict[str, Any] = {"preset": name, "about": {w.side: w.about | {"peak_mb": w.peak_mb} for w in workers}}
    result["share"] = shares
    result |= {"tokens_per_second": {s: tokens / statistics.median(t) for s, t in medians.items()}}
    result["of"] = compare(workers, medians)
    if "ours / torch" in result["of"]:
        result["ratio"], result["ratios"], result["processor_ratio"] = result["of"]["ours / torch"]
    sys.stdout.flush()
    return result


PAIRS = (
    ("ours", "torch"),
    ("before", "torch"),
    ("ours", "before"),
    *(("ours-bf16", other) for other in ("ours", "torch", "torch-autocast", "torch-bf16")),
)


def compare(workers: list[Side], medians: dict[str, list[float]]) -> dict[str, tuple[float, list[float], float]]:
    """Print how one side compares with another: the median of the rounds' ratios, these, and that of processor time."""
    used = {worker.side: statistics.median(row[4] for row in worker.rows) for worker in workers}
    result = {}
    for side, other in PAIRS:
        if side not in medians or other not in medians:
            continue
        ratios = [theirs / mine for mine, theirs in zip(medians[side], medians[other], strict=True)]
        ratio, processor_ratio = statistics.median(ratios), used[other] / used[side]
        result[f"{side} / {other}"] = ratio, ratios, processor_ratio
        print(
            f"{side} / {other}: {ratio:.2f} of its tokens/s (rounds {min(ratios):.2f}-{max(ratios):.2f}), "
            f"{processor_ratio:.2f} of its tokens per second of processor time"
        )
    return result


def installed(sides: list[str]) -> list[str]:
    """Those of the sides that can run here."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    able = [side for side in sides if not absent or not side.startswith("torch")]
    if able != sides:
        print(f'not installed: {", ".join(absent)}; only erniekit is timed (pip install "erniekit[parity]")')
    return able


def main() -> None:
    """Parse the command line and run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", choices=[*PRESETS, []], help=f"default: {' '.join(PRESETS)}")
    parser.add_argument("--config", type=Path, help="a directory with config.json instead of a preset")
    parser.add_argument("--batch", type=int, help="rows (default: the preset's; 4 with --config)")
    parser.add_argument("--seq", type=int, help="tokens a row (default: the preset's; 512 with --config)")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into each row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each side (default: what erniekit takes by itself)")
    parser.add_argument("--only", choices=[*SIDES, *IN_16_BITS], help="one side alone")
    parser.add_argument("--before", type=Path, help="another checkout of erniekit, which takes turns with this one")
    parser.add_argument("--bf16", action="store_true", help="the sides in 16 bits take turns as well")
    parser.add_argument("--profile", action="store_true", help="afterwards, time by operator (stderr)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", choices=[*SIDES, *IN_16_BITS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    cases = {name: PRESETS[name] for name in args.presets or PRESETS}
    if args.config:
        cases = {str(args.config): (json.loads((args.config / "config.json").read_text()), 4, 512)}
    sides = installed([args.only] if args.only else [*SIDES, *(IN_16_BITS if args.bf16 else ())])
    results = []
    for name, (config, batch, seq) in cases.items():
        job = {"config": config, "batch": args.batch or batch, "seq": args.seq or seq, "documents": args.documents}
        lengths = np.bincount(documents_in_row(job["seq"], args.documents)).repeat(job["batch"])
        job["flops"] = product_flops(config, job["batch"] * job["seq"], lengths)
        job |= {"warmup": args.warmup, "threads": args.threads, "contents": f"{args.documents} documents a row"}
        results.append(bench(name, job, sides, args.rounds, args.profile, before=args.before))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
