"""Batch-size warm-up: how many microbatches a step has, and how many steps the data last."""

import pytest

from erniekit.training.batch_warmup import microbatches_at, steps_for


def test_the_batch_grows_to_its_full_size_and_stays():
    assert [microbatches_at(step, 8, 3) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    assert [microbatches_at(step, 2, 5) for step in range(7)] == [1, 1, 1, 2, 2, 2, 2]


def test_no_warm_up_is_full_at_once():
    assert microbatches_at(0, 8, 0) == 8


@pytest.mark.parametrize("total", [0, 1, 2, 5, 12, 13, 40])
@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_the_steps_use_up_the_data(total: int, warmup: int):
    steps = steps_for(total, 8, warmup)
    used = sum(microbatches_at(step, 8, warmup) for step in range(steps))
    before = sum(microbatches_at(step, 8, warmup) for step in range(steps - 1))
    assert used >= total
    assert steps == 0 or before < total
