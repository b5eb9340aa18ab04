"""Every schedule is right, ends where sends wait for their receivers, and costs what its formulas say."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.parallel.pipeline_schedule import (
    Action,
    Backward,
    Forward,
    Recv,
    Send,
    bubble_fraction,
    describe,
    forward_plan,
    peak_live,
    plan,
)


@st.composite
def cases(draw) -> tuple[str, int, int, int]:
    """(schedule, stages, microbatches, chunks)"""
    schedule = draw(st.sampled_from(["1f1b", "interleaved", "memory_efficient"]))
    chunks = 1 if schedule == "1f1b" else draw(st.integers(2, 4))
    return schedule, draw(st.integers(2, 7)), draw(st.integers(1, 19)), chunks


def check_each_list(lists: list[list[Action]], chunks: int, microbatches: int, kinds=(Forward, Backward)) -> None:
    """Every chunk sees every microbatch once in each direction, forward first; inputs are received before they are
    used, results computed before they are sent, and nothing is exchanged that nobody uses.
    """
    every = {(c, i) for c in range(chunks) for i in range(microbatches)}
    last = len(lists) * chunks - 1
    for stage, actions in enumerate(lists):
        for kind in kinds:
            done = [(a.chunk, a.microbatch) for a in actions if isinstance(a, kind)]
            assert len(done) == len(every) and set(done) == every
        there = set()  # what has been received or made: (what, "in" or "out", chunk, microbatch)
        for action in actions:
            piece, place = action.chunk * len(lists) + stage, (action.chunk, action.microbatch)
            if isinstance(action, Forward):
                assert piece == 0 or ("activation", "in", *place) in there
                there.add(("activation", "out", *place))
            elif isinstance(action, Backward):
                assert ("activation", "out", *place) in there
                assert piece == last or ("gradient", "in", *place) in there
                there.add(("gradient", "out", *place))
            elif isinstance(action, Send):
                assert (action.what, "out", *place) in there
                assert piece != (last if action.what == "activation" else 0)
            else:
                assert piece != (0 if action.what == "activation" else last)
                there.add((action.what, "in", *place))


def same_message(stages: int, source: int, sent: Action, target: int, got: Action) -> bool:
    """Whether a Send of one stage and a Recv of another mean the same tensor."""
    step = 1 if sent.what == "activation" else -1
    pieces = (sent.chunk * stages + source + step, got.chunk * stages + target)
    return pieces[0] == pieces[1] and (sent.what, sent.microbatch) == (got.what, got.microbatch)


def waiting_time(lists: list[list[Action]], forward: int, backward: int) -> int:
    """The time taken where a send waits for its receiver, and a receive for its sender; transfers are free."""
    stages, clock, position = len(lists), [0] * len(lists), [0] * len(lists)

    def transfer(stage: int, action: Send | Recv) -> bool:
        """Whether the other side stands at its end of this transfer; if so, do it."""
        peer = action.peer
        other = lists[peer][position[peer]] if position[peer] < len(lists[peer]) else None
        if not isinstance(other, (Send, Recv)) or other.peer != stage:
            return False
        ends = (stage, action, peer, other) if isinstance(action, Send) else (peer, other, stage, action)
        assert isinstance(ends[1], Send) and isinstance(ends[3], Recv) and same_message(stages, *ends)
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
                    clock[stage] += forward if isinstance(action, Forward) else backward
                elif not transfer(stage, action):
                    break
                position[stage] += 1
                moved = True
    assert position == [len(actions) for actions in lists], "deadlock"
    return max(clock)


def buffered_time(lists: list[list[Action]], forward: int, backward: int) -> int:
    """The time taken where a sent tensor waits in a buffer; transfers are free, and keep their order along a pair."""
    stages, clock, position = len(lists), [0] * len(lists), [0] * len(lists)
    under_way: dict[tuple[int, int], list[tuple[int, Send]]] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(lists):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if isinstance(action, Send):
                    under_way.setdefault((stage, action.peer), []).append((clock[stage], action))
                elif isinstance(action, Recv):
                    messages = under_way.get((action.peer, stage), [])
                    if not messages:
                        break
                    time, sent = messages.pop(0)
                    assert same_message(stages, action.peer, sent, stage, action)
                    clock[stage] = max(clock[stage], time)
                else:
                    clock[stage] += forward if isinstance(action, Forward) else backward
                position[stage] += 1
                moved = True
    assert position == [len(actions) for actions in lists], "deadlock"
    assert not any(under_way.values()), "a message that nobody receives"
    return max(clock)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_blocking_sends_do_not_deadlock_and_cost_nothing_at_unit_costs(case):
    schedule, stages, microbatches, chunks = case
    lists = plan(schedule, stages, microbatches, chunks, blocking_sends=True)
    check_each_list(lists, chunks, microbatches)
    work = 2 * chunks * microbatches
    assert 1 - work / waiting_time(lists, 1, 1) == pytest.approx(bubble_fraction(stages, microbatches, chunks))


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([(1, 1), (1, 2), (2, 3), (1, 3)]))
def test_bubble_is_the_closed_form_for_any_ratio_of_backward_to_forward(case, costs):
    schedule, stages, microbatches, chunks = case
    forward, backward = costs
    lists = plan(schedule, stages, microbatches, chunks)
    check_each_list(lists, chunks, microbatches)
    work = microbatches * chunks * (forward + backward)
    bubble = bubble_fraction(stages, microbatches, chunks)
    assert 1 - work / buffered_time(lists, forward, backward) == pytest.approx(bubble)
    if microbatches >= stages:
        assert bubble == pytest.approx((stages - 1) / (chunks * microbatches + stages - 1))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_both_kinds_of_lists_compute_and_exchange_the_same_and_send_at_once(case):
    at_once, in_one_order = plan(*case), plan(*case, blocking_sends=True)
    for one, other in zip(at_once, in_one_order):
        computing = [[a for a in actions if isinstance(a, (Forward, Backward))] for actions in (one, other)]
        assert computing[0] == computing[1]
        assert {a for a in one if a not in computing[0]} == {a for a in other if a not in computing[0]}
        for before, action in pairwise(one):
            if isinstance(action, Send):
                assert isinstance(before, (Forward, Backward))
                assert (before.chunk, before.microbatch) == (action.chunk, action.microbatch)


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
    chunks = chunks if stages > 1 else 1
    lists = forward_plan(stages, microbatches, chunks)
    waiting_time(forward_plan(stages, microbatches, chunks, blocking_sends=True), 1, 1)
    buffered_time(lists, 1, 1)
    check_each_list(lists, chunks, microbatches, kinds=(Forward,))
    assert not any(isinstance(a, Backward) for actions in lists for a in actions)


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
            Send("gradient", 0, 0, 0),
            Recv("activation", 0, 1, 0),
            Forward(0, 1),
            Backward(0, 1),
            Send("gradient", 0, 1, 0),
        ],
    ]


def test_description():
    assert describe("interleaved", 8, [[(0, 1), (4, 5)], [(2, 3), (6,)]]) == (
        "pipeline: interleaved, 2 stages x 2 chunks, 8 microbatches, bubble 5.9%, "
        "at most 5, 3 chunk activations stored; layers 0-1+4-5 | 2-3+6"
    )
