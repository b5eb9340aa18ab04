"""The sparse layer against the dense one that does the same arithmetic for a token, forward and backward, interleaved
in one run.

    python tools/bench_moe.py                      # 8 and 64 experts, width 256, 2048 tokens
    python tools/bench_moe.py --hidden 768 --ffn 512

Dense: a SwiGLU block of width (top_k + shared) * ffn. Sparse: top_k of E experts and `shared` shared ones of width ffn.
Prints the medians over the rounds, and the ratio of tokens/s (sparse / dense) with the smallest and largest round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from erniekit.utils import runtime

runtime.prepare()  # as the command does, before the first import of paddle

import paddle  # noqa: E402

from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo  # noqa: E402
from erniekit.moe.router import RouterOptions  # noqa: E402
from erniekit.nn.mlp import SwiGLU  # noqa: E402


def seconds(run: Callable[[], None], repeat: int) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - started) / repeat


def trainer(layer: paddle.nn.Layer, forward: Callable[[paddle.Tensor], paddle.Tensor], x: paddle.Tensor) -> Callable:
    """A forward and a backward pass that leave no gradient behind."""

    def run() -> None:
        forward(x).sum().backward()
        for parameter in layer.parameters():
            parameter.grad = None

    return run


def main() -> None:
    """Measure each number of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    x = paddle.randn([args.tokens, args.hidden])
    x.stop_gradient = False
    dense = SwiGLU(args.hidden, (args.top_k + args.shared) * args.ffn)
    run_dense = trainer(dense, dense, x)
    print("| experts | dense ms | sparse ms | sparse / dense tokens/s | smallest-largest round |")
    print("|---|---|---|---|---|")
    for experts in args.experts:
        sizes = MoESizes(args.hidden, (args.ffn,), experts, args.shared, bias=False, init_std=0.02)
        sparse = MoELayer(sizes, RouterOptions(args.top_k))
        tokens = TokenInfo([args.tokens])
        run_sparse = trainer(sparse, lambda x, layer=sparse, tokens=tokens: layer(x, tokens)[0], x)
        for run in (run_dense, run_sparse):
            seconds(run, 3)
        pairs = [(seconds(run_dense, 3), seconds(run_sparse, 3)) for _ in range(args.rounds)]
        ratios = [dense_s / sparse_s for dense_s, sparse_s in pairs]
        medians = [1e3 * statistics.median(side) for side in zip(*pairs, strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"| {experts} | {medians[0]:.1f} | {medians[1]:.1f} | {statistics.median(ratios):.2f} | {spread} |")


if __name__ == "__main__":
    main()
