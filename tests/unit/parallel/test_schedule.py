"""Every schedule is right, ends where sends wait for their receivers, and costs what its formulas say."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.parallel.schedule import (
    Action,
    Backward,
    Forward,
    Recv,
    Send,
    bubble_fraction,
    check_schedule,
    describe,
    forward_plan,
    peak_live,
    plan,
)
from erniekit.utils.errors import ConfigError


@st.composite
def cases(draw) -> tuple[str, int, int, int]:
    """(schedule, stages, microbatches, chunks)"""
    schedule = draw(st.sampled_from(["1f1b", "interleaved", "memory_efficient"]))
    chunks = 1 if schedule == "1f1b" else draw(st.integers(2, 4))
    return schedule, draw(st.integers(2, 7)), draw(st.integers(1, 19)), chunks


def execute(lists: list[list[Action]], forward: int = 1, backward: int = 2) -> int:
    """Run the lists where a send waits for its receiver, and a receive for its sender. Returns the time taken.

    Checks that both sides of a transfer mean the same thing and that nothing is used before it is there.
    """
    stages = len(lists)
    clock, position = [0] * stages, [0] * stages
    held: list[set[tuple[str, int, int]]] = [set() for _ in lists]  # (what, piece, microbatch) on each stage
    last = stages * (1 + max(action.chunk for action in lists[0])) - 1

    def compute(stage: int, action: Forward | Backward) -> None:
        piece, microbatch = action.chunk * stages + stage, action.microbatch
        if isinstance(action, Forward):
            assert piece == 0 or ("activation", piece - 1, microbatch) in held[stage]
            held[stage].add(("activation", piece, microbatch))
        else:
            assert ("activation", piece, microbatch) in held[stage]
            assert piece == last or ("gradient", piece + 1, microbatch) in held[stage]
            held[stage].add(("gradient", piece, microbatch))
        clock[stage] += forward if isinstance(action, Forward) else backward

    def transfer(stage: int, action: Send | Recv) -> bool:
        """Whether the other side stands at its end of this transfer; if so, do it."""
        peer = action.peer
        other = lists[peer][position[peer]] if position[peer] < len(lists[peer]) else None
        if not isinstance(other, (Send, Recv)) or other.peer != stage:
            return False
        assert isinstance(other, Send) != isinstance(action, Send), "both send or both receive"
        (source, sent), (target, got) = ((stage, action), (peer, other))[:: 1 if isinstance(action, Send) else -1]
        piece, needed_by = sent.chunk * stages + source, got.chunk * stages + target
        assert (sent.what, sent.microbatch) == (got.what, got.microbatch)
        assert needed_by == piece + (1 if sent.what == "activation" else -1)
        assert (sent.what, piece, sent.microbatch) in held[source]
        held[target].add((sent.what, piece, sent.microbatch))
        clock[stage] = clock[peer] = max(clock[stage], clock[peer])
        position[peer] += 1
        return True

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(lists):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if isinstance(action, (Forward, Backward)):
                    compute(stage, action)
                elif not transfer(stage, action):
                    break
                position[stage] += 1
                moved = True
    assert position == [len(actions) for actions in lists], "deadlock"
    return max(clock)


def buffered_time(lists: list[list[Action]], forward: int, backward: int) -> int:
    """The time taken if a sent tensor waits in a buffer and costs nothing."""
    stages, sent, clock, position = len(lists), {}, [0] * len(lists), [0] * len(lists)
    while any(position[s] < len(lists[s]) for s in range(stages)):
        for stage in range(stages):
            while position[stage] < len(lists[stage]):
                action = lists[stage][position[stage]]
                if isinstance(action, Recv):
                    source = action.chunk * stages + stage + (-1 if action.what == "activation" else 1)
                    key = (action.what, source, action.microbatch)
                    if key not in sent:
                        break
                    clock[stage] = max(clock[stage], sent[key])
                elif isinstance(action, Send):
                    sent[action.what, action.chunk * stages + stage, action.microbatch] = clock[stage]
                else:
                    clock[stage] += forward if isinstance(action, Forward) else backward
                position[stage] += 1
    return max(clock)


@settings(max_examples=120, deadline=None)
@given(cases())
def test_every_chunk_runs_each_microbatch_once_and_nothing_deadlocks_or_comes_too_early(case):
    schedule, stages, microbatches, chunks = case
    lists = plan(schedule, stages, microbatches, chunks)
    every = {(c, i) for c in range(chunks) for i in range(microbatches)}
    for actions in lists:
        for kind in (Forward, Backward):
            done = [(a.chunk, a.microbatch) for a in actions if isinstance(a, kind)]
            assert len(done) == len(every) and set(done) == every
    execute(lists)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([(1, 1), (1, 2), (2, 3), (1, 3)]))
def test_bubble_is_the_closed_form_for_any_ratio_of_backward_to_forward(case, costs):
    schedule, stages, microbatches, chunks = case
    forward, backward = costs
    work = microbatches * chunks * (forward + backward)
    # The compute order with the earliest possible times: sends early, receives late.
    lists = [_sends_early(actions) for actions in plan(schedule, stages, microbatches, chunks)]
    bubble = bubble_fraction(stages, microbatches, chunks)
    assert 1 - work / buffered_time(lists, forward, backward) == pytest.approx(bubble)
    if microbatches >= stages:
        assert bubble == pytest.approx((stages - 1) / (chunks * microbatches + stages - 1))


def _sends_early(actions: list[Action]) -> list[Action]:
    """The same list with each send right behind, and each receive right before, the computation it belongs to."""
    sends = {(a.what, a.chunk, a.microbatch): a for a in actions if isinstance(a, Send)}
    receives = {(a.what, a.chunk, a.microbatch): a for a in actions if isinstance(a, Recv)}
    out: list[Action] = []
    for action in actions:
        if isinstance(action, (Forward, Backward)):
            key = ("activation" if isinstance(action, Forward) else "gradient", action.chunk, action.microbatch)
            out += [receives[key]] if key in receives else []
            out.append(action)
            out += [sends[key]] if key in sends else []
    return out


@settings(max_examples=60, deadline=None)
@given(cases())
def test_waiting_for_receivers_costs_1f1b_and_memory_efficient_nothing_and_interleaved_little(case):
    schedule, stages, microbatches, chunks = case
    ideal = microbatches * chunks * 3 / (1 - bubble_fraction(stages, microbatches, chunks))
    taken = execute(plan(schedule, stages, microbatches, chunks))
    assert taken <= ideal * (1.3 if schedule == "interleaved" else 1) + 1e-6


@settings(max_examples=60, deadline=None)
@given(cases())
def test_kept_activations_are_the_closed_form(case):
    schedule, stages, microbatches, chunks = case
    for stage, actions in enumerate(plan(schedule, stages, microbatches, chunks)):
        live = peak = 0
        for action in actions:
            live += isinstance(action, Forward) - isinstance(action, Backward)
            peak = max(peak, live)
        assert peak == peak_live(schedule, stage, stages, microbatches, chunks)
        if schedule == "1f1b":
            assert peak == min(stages - stage, microbatches)
        elif microbatches % stages == 0:
            ahead = stages - 1 - stage
            expected = (chunks - 1) * stages + 1 + (2 if schedule == "interleaved" else 1) * ahead
            assert peak == min(expected, chunks * microbatches)


def test_memory_efficient_keeps_less_than_interleaved_at_the_same_bubble():
    kept = {name: [peak_live(name, s, 4, 8, 2) for s in range(4)] for name in ("interleaved", "memory_efficient")}
    assert kept == {"interleaved": [11, 9, 7, 5], "memory_efficient": [8, 7, 6, 5]}
    assert bubble_fraction(4, 8, 2) == pytest.approx(3 / 19)


def test_one_stage_alternates_without_transfers():
    assert plan("1f1b", 1, 3) == [[f(0, i) for i in range(3) for f in (Forward, Backward)]]
    assert bubble_fraction(1, 3) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_forward_only(stages: int, microbatches: int, chunks: int):
    lists = forward_plan(stages, microbatches, chunks if stages > 1 else 1)
    execute(lists)
    for actions in lists:
        assert not any(isinstance(a, Backward) for a in actions)
        assert sum(isinstance(a, Forward) for a in actions) == microbatches * (chunks if stages > 1 else 1)


def test_two_stages_by_hand():
    assert plan("1f1b", 2, 2) == [
        [
            Forward(0, 0),
            Send("activation", 0, 0, 1),
            Forward(0, 1),
            Send("activation", 0, 1, 1),
            Recv("gradient", 0, 0, 1),
            Backward(0, 0),
            Recv("gradient", 0, 1, 1),
            Backward(0, 1),
        ],
        [
            Recv("activation", 0, 0, 0),
            Forward(0, 0),
            Backward(0, 0),
            Recv("activation", 0, 1, 0),
            Send("gradient", 0, 0, 0),
            Forward(0, 1),
            Backward(0, 1),
            Send("gradient", 0, 1, 0),
        ],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zero", 2, 1), "choose one of 1f1b, interleaved, memory_efficient"),
        (("1f1b", 2, 2), "virtual_pp_degree 2: the 1f1b schedule has one chunk"),
        (("interleaved", 1, 2), "virtual_pp_degree 2 with pipeline_parallel_degree 1"),
        (("interleaved", 2, 1), "needs at least 2 chunks"),
        (("memory_efficient", 2, 1), "needs at least 2 chunks"),
    ],
)
def test_refusals(arguments, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_schedule(*arguments)


def test_description():
    assert describe("interleaved", 8, [[(0, 1), (4, 5)], [(2, 3), (6,)]]) == (
        "pipeline: interleaved, 2 stages x 2 chunks, 8 microbatches, bubble 5.9%, "
        "chunk activations kept at most 5, 3; layers 0-1+4-5 | 2-3+6"
    )
