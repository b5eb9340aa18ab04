"""How often a step of several ranks makes the host wait: tests/unit/training/test_host_reads.py for one."""

from pathlib import Path

import pytest
from support.equality import keys_for, prepare
from support.host_reads import of_a_step
from support.worlds import World

FETCH, EXPERTS = "utils/device_sums.py:fetch", "moe/layer.py:_start"
FLAGS = "parallel/grad_sync.py:finish"  # which parameters have a gradient on any rank: of all buckets at once
HOST = "parallel/comm.py:_on_host"  # host values that ranks exchange


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("host_reads")
    prepare(path)
    return path


@pytest.mark.parametrize("microbatches", [2, 4])
def test_host_reads_of_a_pipeline_stage(world2: World, directory: Path, microbatches: int):
    """The stages' terms and their routers' records (a length and a value each), and the norm."""
    keys = keys_for(str(directory), "moe", rows=8 // microbatches, pipeline_parallel_degree=2)
    ranks = world2.run(of_a_step, keys=keys)
    for found, sparse_layers in zip(ranks, (1, 2), strict=True):
        assert found["reads"] == {FETCH: 1, FLAGS: 1, HOST: 5, EXPERTS: sparse_layers * microbatches}
        assert found["uploads"]["parallel/comm.py"] == 5 and "parallel/grad_sync.py" not in found["uploads"]


def test_host_reads_of_data_ranks(world2: World, directory: Path):
    """Counts before the step, sums and the norm after it."""
    keys = keys_for(str(directory), "dense", 2, rows=2, sharding="stage1", sharding_parallel_degree=2)
    for found in world2.run(of_a_step, keys=keys):
        assert found["reads"] == {FETCH: 1, FLAGS: 1, HOST: 3}
        assert found["uploads"] == {"parallel/comm.py": 3, "training/recipes/causal.py": 6}


def test_expert_ranks_exchange_counts_in_each_sparse_layer(world2: World, directory: Path):
    keys = keys_for(str(directory), "moe", 2, rows=2, expert_parallel_degree=2)
    for found in world2.run(of_a_step, keys=keys):
        assert found["reads"] == {FETCH: 1, FLAGS: 1, HOST: 3 + 3 * 2, EXPERTS: 3 * 2}
