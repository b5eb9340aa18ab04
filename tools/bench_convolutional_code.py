"""The encoder of `wint2`: weights a second of one core, and the error that it leaves; or a search for its two numbers.

    OMP_NUM_THREADS=1 python tools/bench_convolutional_code.py
    OMP_NUM_THREADS=1 python tools/bench_convolutional_code.py --search 6000

Weights are normal. Seconds are processor time, which other work on the machine disturbs least. With --search, pairs of
code_scale and code_zp are drawn at random, scored by the error of normal vectors of four at the best scale, and the
best ones changed a little, again and again.
"""

import argparse
import time

import numpy as np

from erniekit.precision.convolutional_code import choose_scales, decode, encode, nearest_point, reachable_points

STEPS = (0.054, 0.058, 0.062, 0.066)


def bench(num_out: int, num_in: int) -> None:
    weight = np.random.default_rng(0).normal(size=(num_out, num_in)).astype(np.float32)
    choose_scales(weight[:1, :128])  # makes the table
    times = [time.process_time()]
    scales = choose_scales(weight)
    times.append(time.process_time())
    words = encode(weight, scales)
    times.append(time.process_time())
    back = decode(words, scales)
    times.append(time.process_time())
    for name, seconds in zip(("scales", "words", "decoding"), np.diff(times), strict=True):
        print(f"{name:9} {weight.size / seconds / 1e6:7.1f} M weights/s")
    print(f"encoding  {weight.size / (times[2] - times[0]) / 1e6:7.1f} M weights/s")
    print(f"|W' - W| / |W| = {np.linalg.norm(back - weight) / np.linalg.norm(weight):.4f}")


def score(code: tuple[float, float], vectors: np.ndarray) -> float:
    """The least relative error of `vectors` [n, 4] over STEPS, each with its least-squares scale."""
    points, best = reachable_points(*code), 1.0
    for step in STEPS:
        chosen = points[nearest_point(vectors / np.float32(step), points, np.eye(4))]
        explained = (vectors * chosen).sum() ** 2 / (chosen**2).sum() / (vectors**2).sum()
        best = min(best, float(np.sqrt(1 - explained)))
    return best


def search(count: int, seed: int) -> None:
    """Half of the pairs at random on few vectors; then changes of the best, on more."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(65536, 4)).astype(np.float32)
    drawn = []
    for _ in range(count // 2):
        scale = round(rng.uniform(64, 128.5) * 32) / 32
        drawn.append((scale, float(round(rng.uniform(0, max(32767 - 255 * scale, 0))))))
    best = sorted((score(code, vectors[:2048]), code) for code in drawn)[: max(count // 100, 1)]
    best = sorted((score(code, vectors[:16384]), code) for _, code in best)[:4]
    for i in range(count // 4):
        at = i % len(best)
        scale = round((best[at][1][0] + rng.normal() * 0.05) * 32) / 32
        code = scale, float(round(best[at][1][1] + rng.normal() * 10))
        if code[1] >= 0 and 255 * scale + code[1] <= 32767:
            best[at] = min(best[at], (score(code, vectors[:16384]), code))
    for _, code in sorted(best):
        print(f"code_scale {code[0]:.5f} code_zp {code[1]:.0f}: {score(code, vectors):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--in", dest="num_in", type=int, default=4096)
    parser.add_argument("--search", type=int, metavar="PAIRS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.search:
        search(args.search, args.seed)
    else:
        bench(args.out, args.num_in)


if __name__ == "__main__":
    main()
