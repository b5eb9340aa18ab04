"""Every moment of a profile belongs to one part."""

import itertools
from collections.abc import Callable

import pytest

from erniekit.training.profiling import recorder as recording
from erniekit.training.profiling.recorder import BACKWARD, COMMUNICATION, FORWARD, HEAD, OUTSIDE, Interval, Recorder


class Ticks:
    """A clock by which a second passes between two marks."""

    def __init__(self) -> None:
        self._count = itertools.count(5)

    def mark(self) -> float:
        return float(next(self._count))

    def seconds(self, moments: list[float]) -> list[float]:
        return moments


def recorded(run: Callable[[Recorder], None]) -> list[tuple[str, int, str]]:
    recorder = Recorder(Ticks())
    recorder.begin()
    run(recorder)
    intervals = recorder.end()
    assert [interval.start for interval in intervals] == list(range(len(intervals)))  # nothing between them
    assert {interval.seconds for interval in intervals} == {1.0}
    return [(interval.name, interval.layer, interval.phase) for interval in intervals]


def test_time_belongs_to_the_innermost_part():
    def run(recorder: Recorder) -> None:
        with recorder.span(FORWARD):
            recorder.enter("sparse layer", 3)
            recorder.enter("experts", 3)
            recorder.leave()
            recorder.leave()
            with recorder.span(HEAD):
                pass

    assert recorded(run) == [
        ("between the parts", -1, "host"),
        (OUTSIDE, -1, FORWARD),
        ("sparse layer", 3, FORWARD),
        ("experts", 3, FORWARD),
        ("sparse layer", 3, FORWARD),
        (OUTSIDE, -1, FORWARD),
        (HEAD, -1, FORWARD),
        (OUTSIDE, -1, FORWARD),
        ("between the parts", -1, "host"),
    ]


def test_a_span_that_an_error_ends_is_over():
    def run(recorder: Recorder) -> None:
        with pytest.raises(StopIteration), recorder.span("data"):
            raise StopIteration

    assert recorded(run)[1:] == [("data", -1, "data"), ("between the parts", -1, "host")]


def test_the_backward_pass_begins_in_the_head_and_goes_from_part_to_part():
    def run(recorder: Recorder) -> None:
        with recorder.span(FORWARD), recorder.span(HEAD):
            pass
        with recorder.span(BACKWARD):
            recorder.switch("norm", -1)
            recorder.switch("experts", 1)
            recorder.waiting("all_to_all of 64 bytes with ranks 0, 1")
            recorder.waiting(None)
            recorder.switch("norm", 1)
        recorder.switch("norm", 0)  # outside of a backward pass: nothing

    assert recorded(run)[5:] == [
        (HEAD, -1, BACKWARD),
        ("norm", -1, BACKWARD),
        ("experts", 1, BACKWARD),
        ("all_to_all", -1, COMMUNICATION),
        ("experts", 1, BACKWARD),
        ("norm", 1, BACKWARD),
        ("between the parts", -1, "host"),
    ]


def test_a_stage_without_the_head_begins_outside():
    def run(recorder: Recorder) -> None:
        with recorder.span(BACKWARD):
            pass

    assert recorded(run)[1] == (OUTSIDE, -1, BACKWARD)


def test_a_gpus_clock_reads_its_events_once_at_the_end(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")
            self.number = len(calls)

        def elapsed_time(self, other: "Event") -> float:
            return 2.0 * (other.number - self.number)  # ms

    monkeypatch.setattr(recording.paddle.device.cuda, "Event", Event)
    monkeypatch.setattr(recording.paddle.device, "synchronize", lambda: calls.append("synchronize"))
    recorder = Recorder(recording.DeviceClock())
    recorder.begin()
    recorder.enter("norm", 2, FORWARD)
    recorder.leave()
    found = recorder.end()
    assert calls == ["record"] * 4 + ["synchronize"]
    assert [interval.seconds for interval in found] == pytest.approx([0.002] * 3)
    assert isinstance(found[1], Interval) and (found[1].name, found[1].layer) == ("norm", 2)
