"""What an agent needs to know about its job."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """A number of processes that the job can run with, and the key=value words that make a worker do so.

    note: what changes with it, for the user.
    """

    world: int
    overrides: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Master:
    """Where the agents of several hosts meet, and this host's place among them if the scheduler has told it."""

    address: str
    port: int
    node: int | None = None


@dataclass(frozen=True)
class Limits:
    """Seconds, and a number of restarts.

    fault: within this time a rank that died or hangs ends the job. rendezvous: how long hosts wait for one another.
    elastic: after a fault the job continues without the hosts that do not come back.
    """

    fault: float
    rendezvous: float
    max_restarts: int = 0
    elastic: bool = False

    @property
    def detect(self) -> float:
        """When a rank counts as hanging; what is left of `fault` is for agreeing on it and ending."""
        return self.fault * 2 / 3


@dataclass(frozen=True)
class Job:
    """One host's part of a job.

    command: what a worker is started with; `Layout.overrides` and `again()` are appended to it.
    environ: the environment that workers inherit.
    slots: worker processes a host. devices: the GPUs for them, one each; empty on a CPU.
    layouts: from the whole job to the smallest one that an elastic job may shrink to.
    token: what the job's processes know and strangers do not.
    config: what must be equal on all hosts.
    again: the arguments that make a restarted worker resume from the last checkpoint.
    reads_terminal: rank 0 reads the agent's standard input, and Ctrl-C goes to rank 0 instead of ending the job.
    """

    command: tuple[str, ...]
    environ: Mapping[str, str]
    hosts: int
    slots: int
    layouts: tuple[Layout, ...]
    limits: Limits
    logs: Path
    token: str
    devices: tuple[str, ...] = ()
    master: Master | None = None
    config: Mapping[str, str] | None = None
    again: Callable[[], list[str]] = list
    reads_terminal: bool = False
