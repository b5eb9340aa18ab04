"""Measures what this machine reaches, and writes it in the form of hardware.yaml for `hardware=FILE`.

Matrix products by size, memory bandwidth, copies in host memory, and the launch of a small kernel. The peak is the
fastest product that was measured, so the efficiencies are relative to it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from erniekit.utils import atomic

SIZES = (64, 128, 256, 512, 1024)
ROUNDS = 5
_WARM_UP = 2
_SECONDS = 0.02  # one round lasts at least this long


@dataclass(frozen=True)
class Measured:
    """`flops`: FLOP/s of square products in fp32 by size; `memory`: bytes a second of an addition; `launch`: seconds of
    an operation on one number; `host_copy`: bytes a second of a copy in host memory.
    """

    flops: dict[int, float]
    memory: float
    launch: float
    host_copy: float

    @property
    def peak(self) -> float:
        """FLOP/s of the fastest product."""
        return max(self.flops.values())


def seconds_of(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of one call in the fastest of several rounds, each of as many calls as take some time: what else runs on
    the machine only makes a round longer.
    """
    for _ in range(_WARM_UP):
        run()
    calls, spent = 1, 0.0
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            run()
        spent = time.perf_counter() - started
        if spent >= _SECONDS:
            break
        calls *= 2
    times = [spent / calls]
    for _ in range(rounds - 1):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def measure(sizes: tuple[int, ...] = SIZES, megabytes: int = 64, rounds: int = ROUNDS) -> Measured:
    """Measure this process's device; on a CPU with the threads that Paddle has."""
    flops = {}
    for size in sizes:
        left, right = (paddle.rand([size, size]) for _ in range(2))
        flops[size] = 2 * size**3 / seconds_of(lambda a=left, b=right: paddle.matmul(a, b), rounds)  # type: ignore[misc]
    values = paddle.rand([megabytes * 2**20 // 4])
    other = paddle.rand(values.shape)
    memory = 3 * 4 * values.size / seconds_of(lambda: values + other, rounds)
    one = paddle.rand([1])
    launch = seconds_of(lambda: one + one, rounds)
    source = np.ones(megabytes * 2**20, np.uint8)
    target = np.empty_like(source)
    host_copy = source.size / seconds_of(lambda: np.copyto(target, source), rounds)
    return Measured(flops, memory, launch, host_copy)


def to_yaml(measured: Measured, name: str) -> str:
    """The measurement as a table of hardware that starts from the packaged CPU."""
    peak = measured.peak
    size = ", ".join(f"{size}: {flops / peak:.3f}" for size, flops in _monotonic(measured.flops).items())
    return (
        "# Written by `erniekit plan calibrate` from measurements of one machine: `hardware=FILE gpu=cpu`.\n"
        "# The peak is the fastest product that was measured, hence product: 1.0.\n"
        "cards:\n"
        f"  {name}:\n"
        f"{'' if name == 'CPU' else '    like: CPU' + chr(10)}"
        f"    bf16: {peak / 1e12:.4f}\n"
        f"    fp16: {peak / 1e12:.4f}\n"
        f"    fp32: {peak / 1e12:.4f}\n"
        f"    memory_tb_s: {measured.memory / 1e12:.5f}\n"
        f"    pcie_gb_s: {measured.host_copy / 1e9:.2f}\n"
        f"    launch_us: {measured.launch * 1e6:.2f}\n"
        f"    efficiency: {name.lower()}_measured\n"
        "efficiencies:\n"
        f"  {name.lower()}_measured:\n"
        "    like: cpu\n"
        "    product: {bf16: 1.0}\n"
        "    memory: 1.0\n"
        f"size: {{{size}}}\n"
    )


def _monotonic(flops: dict[int, float]) -> dict[int, float]:
    """The measurements with what noise makes fall removed: a larger product is never slower."""
    best, kept = 0.0, {}
    for size in sorted(flops):
        best = max(best, flops[size])
        kept[size] = best
    return kept


def calibrate(path: Path, name: str = "CPU", measured: Measured | None = None) -> Measured:
    """Measure this machine, or take a measurement, and write the table."""
    measured = measure() if measured is None else measured
    atomic.write_text(path, to_yaml(measured, name))
    return measured
