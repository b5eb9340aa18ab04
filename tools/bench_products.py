"""Matrix products on a CPU in GFLOP/s: Paddle's in fp32, those of emulate_precision in bf16, those of
matmul_precision: bf16 with the rounding of both factors, and torch's in fp32 and bf16.

    python tools/bench_products.py [--threads 1] [--rounds 6]

Each cell is the fastest of the rounds; all kinds of product take turns in one process. torch is left out where it is
not installed.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

SIZES = ((1024, 768, 2048), (1024, 1024, 1024), (256, 512, 512))


def products(x: np.ndarray, y: np.ndarray, threads: int) -> dict[str, Callable[[], object]]:
    """Each kind of product of two matrices."""
    import paddle

    from erniekit.nn import cpu_ops, factors, narrow, onednn

    def of_rounded() -> paddle.Tensor:
        with factors.rounded():
            return cpu_ops.matmul(*wide)

    wide = [paddle.to_tensor(matrix) for matrix in (x, y)]
    short = [matrix.astype("bfloat16") for matrix in wide]
    kinds: dict[str, Callable[[], object]] = {
        "Paddle fp32": lambda: paddle.matmul(*wide),
        "bf16, widened and rounded": lambda: paddle.matmul(*(m.astype("float32") for m in short)).astype("bfloat16"),
    }
    if onednn.is_available(paddle.bfloat16):
        kinds["bf16 by oneDNN"] = lambda: narrow.matmul(*short)
    if onednn.multiplies_bf16():
        kinds["fp32, factors rounded to bf16"] = of_rounded
    try:
        import torch
    except ImportError:
        return kinds
    torch.set_num_threads(threads)
    theirs = [torch.from_numpy(matrix) for matrix in (x, y)]
    theirs_short = [matrix.bfloat16() for matrix in theirs]
    return kinds | {
        "torch fp32": lambda: torch.matmul(*theirs),
        "torch bf16": lambda: torch.matmul(*theirs_short),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    from erniekit.utils import runtime

    runtime.prepare()
    import paddle

    paddle.base.core.set_num_threads(args.threads)
    random = np.random.default_rng(0)
    for number, (rows, inner, columns) in enumerate(SIZES):
        x, y = (random.normal(size=size).astype(np.float32) for size in ((rows, inner), (inner, columns)))
        kinds = products(x, y, args.threads)
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(args.rounds + 1):  # the first one warms up
            for name, product in kinds.items():
                started = time.perf_counter()
                product()
                best[name] = min(best[name], time.perf_counter() - started)
        if number == 0:
            print("| rows x inner x columns |", " | ".join(kinds), "|")
            print("|---" * (len(kinds) + 1) + "|")
        speeds = " | ".join(f"{2e-9 * rows * inner * columns / seconds:.0f}" for seconds in best.values())
        print(f"| {rows} x {inner} x {columns} | {speeds} |")


if __name__ == "__main__":
    main()
