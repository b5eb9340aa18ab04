"""N ranks with Muon train as one: matrices that ranks divide are made orthogonal as a whole."""

from pathlib import Path
from typing import Any

import pytest
from support.equality import compare, keys_for, prepare, train_some
from support.worlds import World

# As in test_equality.py; measured: at most 9e-7 of losses and 2e-7 of parameters.
TOLERANCE = 1e-5
SHARD2 = {"sharding_parallel_degree": 2, "sharding": "stage1"}
TENSOR2 = {"tensor_parallel_degree": 2}
TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "untied-tp2-sp": ("untied", TENSOR2 | {"sequence_parallel": True, "muon_ffn_split": True}),
    "moe-ep2-sharding": ("moe", SHARD2 | {"expert_parallel_degree": 2, "num_nextn_predict_layers": 1}),
    "moe-tp2-fused": ("moe", TENSOR2 | {"muon_qkv_update_mode": "fused_qkv"}),
    "dense-sharding2-stage2": ("dense", SHARD2 | {"sharding": "stage2", "muon_qkv_update_mode": "split_qkv"}),
    "moe-pp2": ("moe", {"pipeline_parallel_degree": 2}),
    "vl-tp2": ("vl", TENSOR2),
}
FAST = ("untied-tp2-sp", "moe-ep2-sharding")
FOUR = {"moe-tp2-sharding2": ("moe", TENSOR2 | SHARD2)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("muon")
    prepare(path)
    return path


def check(world: World, directory: Path, case: tuple[str, dict[str, Any]]) -> None:
    model, layout = case
    degrees = {name for name in layout if "parallel" in name or name == "sharding"}
    shared = {"optim": "muon"} | {name: value for name, value in layout.items() if name not in degrees}
    data_ranks = layout.get("sharding_parallel_degree", 1)
    alone = train_some(keys_for(str(directory), model, **shared))
    ranks = world.run(train_some, keys=keys_for(str(directory), model, data_ranks, **(shared | layout)))
    losses, parameters = compare(ranks, alone)  # also: copies on several ranks are equal bit for bit
    print(f"{model} {layout}: losses {losses:.2e}, parameters {parameters:.2e}")
    assert losses < TOLERANCE and parameters < TOLERANCE


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TWO])
def test_two_ranks_train_as_one(world2: World, directory: Path, case: str):
    check(world2, directory, TWO[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_train_as_one(world4: World, directory: Path, case: str):
    check(world4, directory, FOUR[case])
