"""Two ranks whose products round their factors to bf16 train as one does (`matmul_precision: bf16`)."""

from pathlib import Path

import pytest
from support import equality
from support.equality import compare, keys_for, train_some
from support.worlds import World

from erniekit.nn import onednn

pytestmark = pytest.mark.skipif(not onednn.multiplies_bf16(), reason="this processor has no bf16 products")

SHARD2 = {"sharding_parallel_degree": 2}
CASES = {
    "dense-tp2-sp": ("dense", 1, {"tensor_parallel_degree": 2, "sequence_parallel": True}),
    "moe-stage3": ("moe", 2, SHARD2 | {"sharding": "stage3"}),
    "moe-ep2": ("moe", 2, SHARD2 | {"sharding": "stage1", "expert_parallel_degree": 2}),
    "dense-pp2": ("dense", 1, {"pipeline_parallel_degree": 2}),
    "dense-cp2": ("dense", 1, {"context_parallel_degree": 2}),
}
QUICK = ("dense-tp2-sp", "moe-ep2")
LOSS = 1e-3  # sums in another order round to other factors; without rounding losses are up to 1.3e-3 away


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matmul_precision")
    equality.prepare(path)
    return path


def check(world: World, directory: Path, case: str) -> None:
    model, data_ranks, keys = CASES[case]
    alone = train_some(keys_for(str(directory), model, rows=2, matmul_precision="bf16"))
    ranks = world.run(
        train_some, keys=keys_for(str(directory), model, data_ranks, rows=2, matmul_precision="bf16", **keys)
    )
    for mine, other in zip(ranks[0]["steps"], alone["steps"], strict=True):
        assert mine["norm"] == pytest.approx(other["norm"], rel=0.05)
    for each in (alone, *ranks):
        each["steps"] = [{"loss": step["loss"]} for step in each["steps"]]
    losses, _ = compare(ranks, alone)  # also: copies on both ranks are equal bit for bit
    print(f"{case}: losses within {losses:.1e} of one rank's")
    assert losses < LOSS


@pytest.mark.parametrize("case", QUICK)
def test_two_ranks_train_as_one(world2: World, directory: Path, case: str):
    check(world2, directory, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_so_it_is_with_other_layouts(world2: World, directory: Path, case: str):
    check(world2, directory, case)
