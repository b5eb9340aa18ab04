"""How much of the time a run makes progress when devices fail, and how often it should save.

Failures are independent, so the time between two of them is exponential with mean M = (hours between failures of one
GPU) / GPUs. Between failures a checkpoint of C seconds is written after every T seconds of work; a failure costs the
work since the last checkpoint, D seconds until it is noticed and R seconds of restart (Young 1974, "A first order
approximation to the optimum checkpoint interval"; Daly 2006, "A higher order estimate of the optimum checkpoint
interval for restart dumps").
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from erniekit.plan.hardware import GIGA, Hardware
from erniekit.utils.errors import ConfigError

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 H100 in 54 days.
LLAMA3_GPU_HOURS = 54 * 24 * 16384 / 419
# Meta's research clusters (arXiv 2410.21680): 6.5 failures in 1000 days of a host with 8 GPUs.
RSC_GPU_HOURS = 8 * 24 * 1000 / 6.5

HOST_GB_S = 2.0  # GB/s at which a host writes to shared storage; assumed

Policy = Literal["restart", "elastic"]


@dataclass(frozen=True)
class Failures:
    """How often devices fail and what a failure costs. `gpu_hours`: mean hours of one GPU between failures.
    `detect`, `restart`: seconds until a failure is noticed (`distributed_timeout`), and from there to the first step.
    `repair`: seconds until a failed host is replaced; a job with spare hosts does not wait for it.
    """

    gpu_hours: float = LLAMA3_GPU_HOURS
    detect: float = 30.0
    restart: float = 300.0
    repair: float = 4 * 3600.0
    spares: bool = True

    def __post_init__(self) -> None:
        if not self.gpu_hours > 0:
            raise ConfigError(f"hours between failures of one GPU: {self.gpu_hours:g} must be above 0.")
        if min(self.detect, self.restart, self.repair) < 0:
            raise ConfigError("seconds to detect, restart and repair: must not be negative.")

    def between(self, gpus: int) -> float:
        """Mean seconds between failures of a job."""
        return self.gpu_hours * 3600 / gpus


@dataclass(frozen=True)
class Goodput:
    """`share`: of the wall time that becomes progress, `interval`: seconds of work between checkpoints, `steps` in
    steps; `waste`: where the rest goes, as shares of the wall time; `failures_a_day`.
    """

    share: float
    interval: float
    steps: int
    waste: dict[str, float]
    failures_a_day: float


def young_interval(checkpoint: float, between: float) -> float:
    """Young's interval, sqrt(2 C M)."""
    return math.sqrt(2 * checkpoint * between)


def daly_interval(checkpoint: float, between: float) -> float:
    """Daly's interval of higher order; M where a checkpoint takes more than 2 M."""
    if checkpoint >= 2 * between:
        return between
    ratio = checkpoint / (2 * between)
    return math.sqrt(2 * checkpoint * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def expected_seconds(work: float, interval: float, checkpoint: float, between: float, lost: float) -> float:
    """Mean wall time for `work` seconds of progress; `lost`: detection and restart after each failure. Exact for
    exponential failures, which may also strike during a checkpoint or a restart (Daly 2006, equation 13).
    """
    segments = work / interval
    return segments * between * math.exp(lost / between) * math.expm1((interval + checkpoint) / between)


def plan_goodput(
    gpus: int,
    step: float,
    checkpoint: float,
    failures: Failures,
    policy: Policy = "restart",
    unit: int = 1,
    save_steps: int | None = None,
) -> Goodput:
    """The share of the time that makes progress.

    checkpoint: seconds for which saving stops the training. policy: `restart` waits for the failed host to be replaced
    where there are no spares; `elastic` continues without the smallest unit of GPUs that it can drop (`unit`, one
    replica of the model) until the host is back. save_steps: steps between checkpoints; None: Daly's interval.
    """
    if min(gpus, step, unit) <= 0 or checkpoint < 0:
        raise ConfigError(f"goodput of {gpus} GPUs with steps of {step:g} s: must be above 0.")
    between = failures.between(gpus)
    best = daly_interval(max(checkpoint, 1e-3), between)
    steps = save_steps or max(round(best / step), 1)
    interval = steps * step
    lost = failures.detect + failures.restart
    if not failures.spares and policy == "restart":
        lost += failures.repair
    wall = expected_seconds(1.0, interval, checkpoint, between, lost)
    without_restarts = expected_seconds(1.0, interval, checkpoint, between, 0.0)
    shares = {"checkpoints": checkpoint / interval, "restarts": wall - without_restarts}
    if not failures.spares and policy == "elastic":
        # A replica is missing from the restart to the repair, when all ranks restart once more.
        missing = min(failures.repair / between, gpus / unit - 1) * unit / gpus
        again = failures.restart / between * wall
        wall = (wall + again) / (1 - missing)
        shares |= {"restarts": shares["restarts"] + again, "missing replicas": missing * wall}
    shares["repeated work"] = without_restarts - 1 - shares["checkpoints"]
    waste = {kind: seconds / wall for kind, seconds in shares.items()}
    return Goodput(1 / wall, interval, steps, waste, 86400 / between)


def checkpoint_seconds(
    bytes_per_gpu: float,
    card: Hardware,
    in_background: bool = True,
    host_gb_s: float = HOST_GB_S,
    gpus_per_node: int = 8,
) -> float:
    """Seconds for which a checkpoint stops the training: the copy to host memory, and if it is not written in the
    background (`use_async_save`) the time until all cards of a host have written at `host_gb_s`.
    """
    copy = bytes_per_gpu / (card.pcie_gb_s * GIGA)
    return copy if in_background else copy + bytes_per_gpu * gpus_per_node / (host_gb_s * GIGA)


def simulate_failures(
    work: float, interval: float, checkpoint: float, between: float, lost: float, seed: int = 0, runs: int = 20
) -> float:
    """Mean wall time for `work` seconds of progress, by drawing failures: a check of `expected_seconds`."""
    generator = np.random.default_rng(seed)
    total = 0.0
    for _ in range(runs):
        done = 0.0
        while done < work:
            piece = min(interval, work - done)
            until = generator.exponential(between)
            if until >= piece + checkpoint:
                total, done = total + piece + checkpoint, done + piece
                continue
            total += until
            while (until := generator.exponential(between)) < lost:  # a failure during the restart begins it again
                total += until
            total += lost
    return total / runs
