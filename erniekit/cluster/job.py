"""The description of a job that an agent starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """A number of processes that the job can run on, with the key=value overrides for its workers.

    note: a message to the user about the differences from the configuration.
    """

    world: int
    overrides: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Master:
    """The address at which the agents of several hosts meet, and this host's number if the scheduler gives one."""

    address: str
    port: int
    node: int | None = None


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, and the number of restarts.

    fault: a rank that died or hangs ends the job within this time. rendezvous: how long hosts wait for one another.
    elastic: after a failure the job continues without the hosts that do not come back.
    """

    fault: float
    rendezvous: float
    max_restarts: int = 0
    elastic: bool = False

    @property
    def detect(self) -> float:
        """The time after which a rank counts as hanging; the rest of `fault` is for ending the job."""
        return self.fault * 2 / 3


@dataclass(frozen=True)
class Job:
    """One host's part of a job.

    command: the command line of a worker; `Layout.overrides` and, at a restart, `again()` of the master's agent are
    appended to it.
    environ: the environment that workers inherit.
    slots: worker processes per host. devices: the GPUs for them, one each; empty on a CPU.
    layouts: the layouts that the job may run in, from the whole job to the smallest of an elastic job.
    token: the shared secret by which the job's processes recognise one another.
    config: the settings that must be equal on all hosts.
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
