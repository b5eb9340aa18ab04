"""The harness itself: results by rank, errors that name their rank, and a world that comes back after a failure."""

import time

import numpy as np
import paddle
import pytest
from support.worlds import RankError, World

from erniekit.parallel import backend, comm


def add_up(values: list[int]) -> tuple[int, list[float]]:
    x = paddle.to_tensor(np.float32(values)) * (backend.world().rank + 1)
    return backend.world().rank, comm.all_reduce_(x, backend.world_group()).tolist()


def fail_on_one(rank: int) -> None:
    if backend.world().rank == rank:
        raise KeyError("my own mistake")
    comm.gather_objects(None, backend.world_group())


def wait_in_vain() -> None:
    if backend.world().rank == 0:
        comm.recv([1], "float32", 1)
    else:
        time.sleep(60)


def send_to_nobody() -> None:
    if backend.world().rank == 0:
        comm.send(paddle.ones([3]), 1)


def test_results_are_ordered_by_rank_and_a_world_is_reused(world2: World):
    assert world2.run(add_up, values=[1, 2]) == [(0, [3.0, 6.0]), (1, [3.0, 6.0])]
    assert world2.run(add_up, values=[5]) == [(0, [15.0]), (1, [15.0])]


def test_failures_are_reported_by_rank_and_the_world_restarts(world2: World):
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*my own mistake"):
        world2.run(fail_on_one, rank=1)
    with pytest.raises(RankError, match=r"(?s)rank 0: not done.*wait_in_vain.*rank 1: not done.*wait_in_vain"):
        world2.run(wait_in_vain, timeout=1)
    with pytest.raises(RankError, match="sends 12 bytes of send, this rank expects"):
        world2.run(send_to_nobody)
    assert world2.run(add_up, values=[1]) == [(0, [3.0]), (1, [3.0])]
