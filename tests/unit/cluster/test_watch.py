"""Which rank is held to hang."""

import dataclasses

import pytest

from erniekit.cluster.watch import PATIENCE, Sign, diagnose
from erniekit.utils.heartbeat import ASKING, START, TRAINING

LIMIT = 20.0


def sign(rank: int, **fields) -> Sign:
    well = Sign(rank, 7, TRAINING, None, silent=1.0, idle=0.5, longest=1.0, at="trainer.py:9 in step")
    return dataclasses.replace(well, **fields)


def test_ranks_that_move_are_well():
    assert diagnose([sign(0), sign(1, waiting="all_reduce", idle=3.0)], LIMIT) is None


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_without_a_record(stopped):
    rank, why = diagnose([sign(0, waiting="all_reduce", idle=25), sign(1, silent=21.0, stopped=stopped)], LIMIT)
    assert rank == 1 and "no sign of life for 21 s" in why
    assert ("SIGSTOP" in why) == stopped


def test_a_rank_that_starts_may_be_silent_unless_it_is_stopped():
    """Importing Paddle, or waiting in its store, holds Python's lock: no thread can write a record."""
    assert diagnose([sign(0, phase=START, silent=100.0)], LIMIT) is None
    assert diagnose([sign(0, phase=START, silent=100.0, stopped=True)], LIMIT) is not None
    assert diagnose([sign(0, phase=START, silent=LIMIT * PATIENCE + 1)], LIMIT) is not None


def test_an_endless_loop_is_told_from_those_who_wait_for_it():
    rank, why = diagnose([sign(0, waiting="all_reduce", idle=21.0), sign(1, idle=22.0), sign(2, idle=0.1)], LIMIT)
    assert rank == 1
    assert "trainer.py:9 in step" in why and "rank 0 has been waiting in all_reduce" in why


def test_long_work_that_nobody_waits_for_is_well():
    assert diagnose([sign(0, idle=1.0), sign(1, idle=100.0)], LIMIT) is None


def test_a_rank_that_was_slow_before_may_be_slow_again():
    waiting = sign(0, waiting="all_reduce", idle=25.0, longest=9.0)
    assert diagnose([waiting, sign(1, idle=25.0, longest=9.0)], LIMIT) is None
    assert diagnose([dataclasses.replace(waiting, idle=28.0), sign(1, idle=28.0, longest=9.0)], LIMIT)[0] == 1


def test_a_save_may_take_long_and_others_may_wait_for_it():
    assert diagnose([sign(0, phase="saving", idle=300.0), sign(1, waiting="barrier", idle=300.0)], LIMIT) is None


def test_nobody_moves_and_nobody_says_that_it_waits():
    """On a GPU a collective returns at once: it is the next read of a result that waits."""
    rank, why = diagnose([sign(0, idle=21.0), sign(1, idle=22.0)], LIMIT)
    assert rank == 1 and "no rank moves" in why


def test_all_wait_for_one_another_and_the_one_behind_is_named():
    rank, why = diagnose(
        [sign(0, waiting="all_reduce", idle=30.0), sign(1, step=6, waiting="receive", idle=21.0)], LIMIT
    )
    assert rank == 1 and "all ranks wait for one another" in why and "rank 0 has been waiting in all_reduce" in why


def test_the_user_may_think_for_hours():
    others = [sign(rank, phase=START, waiting="broadcast", idle=LIMIT * PATIENCE * 2) for rank in (1, 2)]
    asking = sign(0, phase=ASKING, idle=LIMIT * PATIENCE * 2)
    assert diagnose([asking, *others], LIMIT) is None
    assert diagnose([dataclasses.replace(asking, phase=START), *others], LIMIT) is not None
