"""Recomputation: peak memory and time of a training step by recompute_granularity, as ratios to keeping everything.

    python tools/bench_recompute.py                       # 50 M parameters, 8 layers, 8 experts
    python tools/bench_recompute.py --batch 4 --seq 2048 --rounds 9

One model, one batch; the kinds of recomputation take turns, and the ratio is the median over the rounds. Memory is what
Paddle's allocator holds at most during forward and backward beyond what it held before (activations and gradients),
counted by the allocator: no noise. Loss and every gradient must be equal bit for bit, or the tool stops.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
CONFIG = {
    "model_type": "ernie4_5_moe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 448,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
# name -> modules, see RecomputeOptions
KINDS: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "core_attn": ("core_attn",),
    "experts": ("experts",),
    "moe": ("moe",),
    "full_attn": ("attention",),
    "full_attn + use_recompute_moe": ("attention", "moe"),
    "full": ("layer",),
}


class Bench:
    """A model, a batch, and one step of forward and backward on them."""

    def __init__(self, batch: int, seq: int) -> None:
        import paddle

        from erniekit.models.config import ModelConfig
        from erniekit.models.decoder import CausalLM
        from erniekit.models.init import init_weights

        self.paddle = paddle
        self.model = CausalLM(ModelConfig.from_dict(CONFIG))
        init_weights(self.model, 0)
        self.model.train()
        self.ids, self.labels = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, batch, seq))

    def choose(self, kind: str) -> None:
        """Recompute as `kind` says; what was wrapped before is the class's own again."""
        from erniekit.models import activation_checkpoint

        for layer in self.model.sublayers():
            for name in ("forward", "core"):
                layer.__dict__.pop(name, None)
        chosen = KINDS[kind]
        if chosen is not None:
            activation_checkpoint.apply(self.model.model, activation_checkpoint.RecomputeOptions(chosen))

    def run(self) -> tuple[float, int, float]:
        """Seconds, most bytes held beyond those before, loss. The gradients are left in the parameters."""
        from erniekit.losses.lm import linear_cross_entropy
        from erniekit.models.inputs import packed_inputs
        from erniekit.moe.layer import TokenInfo

        paddle, memory = self.paddle, self.paddle.base.core
        for parameter in self.model.parameters():
            parameter.grad = None
        before = memory.host_memory_stat_current_value("Allocated", 0)
        memory.host_memory_stat_reset_peak_value("Allocated", 0)
        started = time.perf_counter()
        rows = TokenInfo([self.ids.shape[1]] * self.ids.shape[0])
        hidden = self.model.model(packed_inputs(self.model, self.ids, np.ones_like(self.ids), tokens=rows))
        weights = paddle.full([self.ids.size], 1.0 / self.ids.size)
        labels = paddle.to_tensor(self.labels.reshape(-1))
        loss, *_ = linear_cross_entropy(hidden.normed, self.model.output_head(), labels, weights)
        loss.backward()
        value = loss.item()
        seconds = time.perf_counter() - started
        return seconds, memory.host_memory_stat_peak_value("Allocated", 0) - before, value

    def checksum(self) -> list[bytes]:
        """The gradients' bytes, hashed."""
        import hashlib

        return [hashlib.sha256(p.grad.numpy().tobytes()).digest() for p in self.model.parameters()]


def main() -> None:
    """Parse the command line, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from erniekit.utils import runtime

    runtime.prepare()  # before the first import of paddle
    bench = Bench(args.batch, args.seq)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    held: dict[str, int] = {}
    expected: tuple[Any, ...] = ()
    for turn in range(args.rounds + 1):  # the first one warms up
        for kind in KINDS:
            bench.choose(kind)
            took, held[kind], loss = bench.run()
            found = (loss, bench.checksum() if turn == 0 else None)
            expected = expected if kind != "none" else found
            if found != expected:
                raise SystemExit(f"{kind}: loss or gradients differ from those of keeping everything")
            if turn:
                seconds[kind].append(took)
    size = sum(int(np.prod(p.shape)) for p in bench.model.parameters()) / 1e6
    print(
        f"{size:.0f} M parameters, batch {args.batch} x {args.seq}, {args.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}; losses and gradients equal bit for bit\n"
    )
    print("| recompute_granularity | peak memory | of none | time of a step, of none | rounds |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        ratios = [mine / none for mine, none in zip(seconds[kind], seconds["none"], strict=True)]
        memory = f"{held[kind] / 2**20:.0f} MiB | {held[kind] / held['none']:.2f}"
        print(f"| {kind} | {memory} | {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |")


if __name__ == "__main__":
    main()
