"""What a busy neighbour costs: training speed alone, and beside programs that spin on the same cores.

    python tools/bench_neighbour.py                       # the tiny model with experts; 0, 1 and 4 spinning programs
    python tools/bench_neighbour.py tiny --rounds 9 --spinning 1
    python tools/bench_neighbour.py --variants product KMP_BLOCKTIME=0 KMP_BLOCKTIME=0,OMP_DYNAMIC=TRUE threads=1

A variant is the product as it is, or as it is with variables of the environment, or with another number of threads; the
variants take turns, each in a process of its own, and each turn is repeated beside every number of spinning programs.
"Slower" is the median over the rounds of a variant's speed alone divided by its speed beside them. "Share": threads of
equal priority share the cores evenly, so that t threads beside n spinning ones on c cores are at least (t + n) / c
times slower, if t + n > c. The losses of every step are compared: whether a variant is alone must not change a bit.

The machine must otherwise be quiet. The spinning programs have ordinary priority and end with this one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_step import PRESETS, serve_side
from bench_worker import PAUSE, Worker

PRODUCT = "product"
# A program that spins until its parent has ended, or for as long as a turn may last.
_SPIN = """
import os, time
parent, end = os.getppid(), time.monotonic() + 120
while os.getppid() == parent and time.monotonic() < end:
    for _ in range(100_000):
        pass
"""


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many programs spin."""
    started = [subprocess.Popen([sys.executable, "-S", "-E", "-c", _SPIN]) for _ in range(count)]
    try:
        time.sleep(PAUSE)  # the idle side's threads stop spinning, and the programs have begun to
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def settings_of(variant: str) -> tuple[dict[str, str], int | None]:
    """(variables, number of threads) of a variant."""
    pairs = [] if variant == PRODUCT else [pair.split("=", 1) for pair in variant.split(",")]
    environment = dict(pairs)
    threads = environment.pop("threads", None)
    return environment, None if threads is None else int(threads)


class Variant(Worker):
    """A variant with what it has run: the losses of all steps, and tokens per second by number of spinning programs."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        environment, threads = settings_of(name)
        super().__init__(__file__, "ours", job | {"environment": environment, "threads": threads})
        self.name, self.losses = name, list[float]()
        self.speeds: dict[int, list[float]] = {}

    def turn(self, steps: int, count: int) -> float:
        """Run some steps beside `count` spinning programs; tokens per second."""
        with spinning(count):
            settling = self.ask(max(1, 2 * steps // 3))["rows"]  # the product notices within a second
            rows = self.ask(steps)["rows"]
        self.losses += [row[0] for row in settling + rows]
        return steps / sum(sum(row[1:4]) for row in rows)


def share(threads: int, count: int) -> float:
    """How many times slower `threads` threads are at least beside `count` spinning ones if the cores are shared evenly
    by all threads.
    """
    return max(1.0, (threads + count) / len(os.sched_getaffinity(0)))


def bench(job: dict[str, Any], names: list[str], counts: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Run all variants in turns, print the table and give the numbers."""
    variants = [Variant(name, job) for name in names]
    steps = max(2, round(seconds * variants[0].turn(2, 0)))
    for variant in variants[1:]:
        variant.turn(2, 0)
    orders = [counts, counts[::-1]]  # variants at the same step are alone and not alone
    for number in range(rounds):
        for place, variant in enumerate(variants if number % 2 == 0 else variants[::-1]):
            for count in orders[(number + place) % 2]:
                variant.speeds.setdefault(count, []).append(variant.turn(steps, count))
    equal = all(variant.losses == variants[0].losses for variant in variants)
    result = report(job, variants, counts) | {"equal_bits": equal}
    print(f"losses of {len(variants[0].losses)} steps: {'the same bits everywhere' if equal else 'NOT EQUAL'}")
    for variant in variants:
        variant.close()
    return result


def report(job: dict[str, Any], variants: list[Variant], counts: list[int]) -> dict[str, Any]:
    """Print the table and give its numbers."""
    tokens = job["batch"] * job["seq"]
    print(f"\n{job['name']}, batch {job['batch']} x {job['seq']}, load {os.getloadavg()[0]:.2f}")
    print(f"{'variant':34}{'spinning':>9}{'tokens/s':>10}{'alone: of product':>19}{'slower (rounds)':>24}{'share':>7}")
    result: dict[str, Any] = {"preset": job["name"], "variants": {}}
    for variant in variants:
        alone, first = variant.speeds[0], variants[0].speeds[0]
        of_product = statistics.median(mine / other for mine, other in zip(alone, first, strict=True))
        found: dict[str, Any] = {"tokens_per_second": tokens * statistics.median(alone), "of_product": of_product}
        print(f"{variant.name:34}{0:9}{found['tokens_per_second']:10.0f}{of_product:19.3f}")
        for count in counts[1:]:
            speeds = variant.speeds[count]
            slower = [quiet / busy for quiet, busy in zip(alone, speeds, strict=True)]
            found[f"slower_beside_{count}"] = statistics.median(slower)
            ranges = f"{np.median(slower):.2f} ({min(slower):.2f}-{max(slower):.2f})"
            speed, least = tokens * statistics.median(speeds), share(variant.about["threads"], count)
            print(f"{'':34}{count:9}{speed:10.0f}{'':19}{ranges:>24}{least:7.2f}")
        result["variants"][variant.name] = found
    return result


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), default="tinymoe")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--variants", nargs="+", default=[PRODUCT], help="the first is what the others compare with")
    parser.add_argument("--spinning", type=int, nargs="*", default=[1, 4], help="numbers of spinning programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn alone")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_side(args.serve)
        return
    config, batch, seq = PRESETS[args.preset]
    job = {"name": args.preset, "config": config, "batch": args.batch or batch, "seq": args.seq or seq}
    job |= {"documents": 1, "warmup": 3}
    result = bench(job, args.variants, [0, *args.spinning], args.rounds, args.seconds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
