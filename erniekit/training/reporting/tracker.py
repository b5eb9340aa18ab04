"""The interface of a board of report_to, and what it gets to know of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets to know at the start.

    directory: where it writes files. start_step: the step after which the run resumes (0: none). config: the
    configuration, of JSON's types. run_id: the run's id in the tracker; None for a new run.
    """

    directory: str
    start_step: int
    project: str
    name: str
    config: dict[str, Any]
    run_id: str | None


class Tracker(Protocol):
    """Takes the numbers of a run. `run_id`: its id in the tracker, None where runs have none."""

    @property
    def run_id(self) -> str | None: ...

    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


Open = Callable[[TrackedRun], Tracker]
