"""One step of thousands of ranks with jitter and slow devices: every replica of the pipeline runs the same lists of
actions with durations of its own, and the step ends when the slowest one has finished.

The ranks of a tensor group, and those that share experts, wait for one another inside every action, so an action takes
as long as the slowest of them. All ranks are simulated; none is replaced by a formula.
"""

from dataclasses import dataclass

import numpy as np

from erniekit.parallel.pipeline_schedule import Compute, Forward
from erniekit.plan.events import Timeline, execute
from erniekit.plan.timing import StepTime
from erniekit.utils.errors import ConfigError


@dataclass(frozen=True)
class Disturbance:
    """`jitter`: standard deviation of an action's duration on one rank, relative to it. `slow`: number of slow devices,
    placed at random, each of which takes `slowdown` times as long. `seed`: of all draws.
    """

    jitter: float = 0.02
    slow: int = 0
    slowdown: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter: {self.jitter:g} must be from 0 to below 1, a share of an action's duration.")
        if self.slow < 0 or self.slowdown < 1:
            raise ConfigError(
                f"slow GPUs: {self.slow} that take {self.slowdown:g} times as long: give 0 or more, and at least 1."
            )


@dataclass(frozen=True)
class SimulatedStep:
    """A step of all ranks. `seconds`: until the last replica is done; `undisturbed`: without jitter and slow devices;
    `replicas`: seconds of each replica's pipeline; `slowest`: its number; `timeline`: its events.
    """

    seconds: float
    undisturbed: float
    replicas: np.ndarray
    slowest: int
    timeline: Timeline

    @property
    def lost(self) -> float:
        """The share of the step that the disturbance costs."""
        return 1 - self.undisturbed / self.seconds


def simulate_step(step: StepTime, disturbance: Disturbance) -> SimulatedStep:
    """Simulate all ranks of a planned step."""
    seconds = _run(step, disturbance, None)
    ends = np.stack([row + stage.after for row, stage in zip(seconds.finished, step.stages)]).max(axis=0)
    slowest = int(ends.argmax())
    timeline = _run(step, disturbance, slowest)
    return SimulatedStep(float(ends.max()), step.seconds, ends, slowest, timeline)


def _run(step: StepTime, disturbance: Disturbance, recorded: int | None) -> Timeline:
    layout = step.run.layout
    if disturbance.slow > layout.gpus:
        raise ConfigError(f"slow GPUs: {disturbance.slow} of {layout.gpus} in all.")
    generator = np.random.default_rng(disturbance.seed)
    replicas, tensor = layout.data * layout.context, layout.tensor
    pace = np.ones((layout.pipeline, replicas, tensor))
    slow = generator.choice(pace.size, disturbance.slow, replace=False)
    pace.reshape(-1)[slow] = disturbance.slowdown
    totals = [
        ([sum(chunk.values()) for chunk in stage.forward], [sum(chunk.values()) for chunk in stage.backward])
        for stage in step.stages
    ]
    has_experts = [any(layer.kind == "sparse" for layer in step.run.stage(stage)) for stage in range(layout.pipeline)]

    def duration(stage: int, action: Compute) -> np.ndarray:
        base = totals[stage][0 if isinstance(action, Forward) else 1][action.chunk]
        noise = 1 + disturbance.jitter * generator.standard_normal((replicas, tensor))
        seconds = base * (pace[stage] * np.maximum(noise, 0.1)).max(axis=1)
        if has_experts[stage] and layout.expert > 1:
            groups = seconds.reshape(-1, layout.expert).max(axis=1)
            seconds = np.repeat(groups, layout.expert)
        return seconds

    return execute(layout.actions(), duration, step.transfer, layout.synchronous_sends, replicas, recorded)
