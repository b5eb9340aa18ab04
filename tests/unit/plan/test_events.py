"""The pipeline's clock: its makespan is that of the schedule's formula, and waiting ranks wait."""

import numpy as np
import pytest

from erniekit.parallel.pipeline_schedule import Backward, Compute, Forward, bubble_fraction, plan
from erniekit.plan.events import execute


def unit(stage: int, action: Compute) -> float:
    return 1.0 if isinstance(action, Forward) else 2.0


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "chunks"),
    [
        ("1f1b", 4, 8, 1),
        ("1f1b", 1, 5, 1),
        ("1f1b", 12, 90, 1),
        ("interleaved", 4, 8, 3),
        ("memory_efficient", 4, 8, 2),
    ],
)
def test_the_bubble_is_that_of_the_formula(schedule: str, stages: int, microbatches: int, chunks: int):
    timeline = execute(plan(schedule, stages, microbatches, chunks), unit, 0.0)
    bubble = 1 - timeline.busy / timeline.seconds[0]
    assert bubble == pytest.approx(np.full((stages, 1), bubble_fraction(stages, microbatches, chunks)))


def test_a_transfer_delays_the_receiver_alone():
    timeline = execute(plan("1f1b", 2, 1), unit, 0.5)
    assert timeline.seconds[0] == 2 * (1 + 2) + 2 * 0.5
    first = [event for event in timeline.events if event.stage == 1 and isinstance(event.action, Forward)]
    assert (first[0].start, first[0].end) == (1.5, 2.5)


def test_synchronous_sends_are_never_faster_and_end():
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("memory_efficient", 2)):
        free = execute(plan(schedule, 4, 8, chunks), unit, 0.1).seconds[0]
        blocking = execute(plan(schedule, 4, 8, chunks, blocking_sends=True), unit, 0.1, synchronous=True).seconds[0]
        assert blocking >= free


def test_replicas_have_durations_of_their_own():
    def slow_in_one(stage: int, action: Compute) -> np.ndarray:
        return np.array([1.0, 3.0]) * unit(stage, action)

    timeline = execute(plan("1f1b", 3, 4), slow_in_one, 0.0, replicas=2, recorded=1)
    assert timeline.seconds[1] == pytest.approx(3 * timeline.seconds[0])
    assert max(event.end for event in timeline.events) == timeline.seconds[1]


def test_a_backward_pass_never_begins_before_its_gradient_arrives():
    timeline = execute(plan("interleaved", 4, 8, 2), unit, 0.25)
    ends = {(e.stage, e.action): e.end for e in timeline.events if isinstance(e.action, Forward | Backward)}
    starts = {(e.stage, e.action): e.start for e in timeline.events if isinstance(e.action, Backward)}
    for (stage, action), start in starts.items():
        if stage < 3:
            assert start >= ends[stage + 1, action] + 0.25
