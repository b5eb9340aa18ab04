"""Two ranks train with fake quantisation as one does, and keep the same ranges of static inputs."""

from pathlib import Path

import numpy as np
import pytest
from support import equality
from support.equality import compare, keys_for, train_some
from support.worlds import World

STATIC = {
    "qat": "fp8_static",
    "hadamard_block_size": 4,
    "apply_online_actscale_step": 2,
    "actscale_moving_rate": 0.3,
}
MTP = {"num_nextn_predict_layers": 1}
SHARD2 = {"sharding_parallel_degree": 2, "sharding": "stage1"}
TENSOR2 = {"tensor_parallel_degree": 2, "sequence_parallel": True}
CASES = {
    "static-tp2-sp": (1, STATIC, TENSOR2),
    "static-ep2-sharding": (2, STATIC, SHARD2 | {"expert_parallel_degree": 2, "recompute": True}),
    "w8a8-tp2": (1, {"qat": "w8a8"}, TENSOR2 | MTP),
    "w4a8-pp2": (1, {"qat": "w4a8", "hadamard_block_size": 16}, {"pipeline_parallel_degree": 2} | MTP),
    "fp8-ep2": (2, {"qat": "fp8"}, {"expert_parallel_degree": 2}),
    "wint8-tp2-recompute": (1, {"qat": "wint8"}, TENSOR2 | {"recompute": True}),
}
# Losses of 5 to 8. Inputs are rounded by a rank's own scale where ranks have different ones (row-split projections by
# token, the present range of static ones), and a token near a tie then goes to another expert.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qat")
    equality.prepare(path)
    return path


def check(world: World, directory: Path, case: str) -> None:
    data_ranks, scheme, layout = CASES[case]
    shared = scheme | {name: value for name, value in layout.items() if name in MTP}
    alone = train_some(keys_for(str(directory), "moe", **shared))
    ranks = world.run(train_some, keys=keys_for(str(directory), "moe", data_ranks, **(scheme | layout)))
    for each in ranks:
        for number, step in enumerate(each["steps"]):
            assert step["norm"] == pytest.approx(alone["steps"][number]["norm"], rel=0.1)
    _check_ranges(alone, ranks)
    for each in (alone, *ranks):
        each["steps"] = [{"loss": step["loss"]} for step in each["steps"]]
        each["tensors"] = {name: value for name, value in each["tensors"].items() if ".product." not in name}
    losses, parameters = compare(ranks, alone)  # also: copies on both ranks are equal bit for bit
    print(f"{case}: losses {losses:.5f}, parameters {parameters:.2e}")
    assert losses < TOLERANCE


def _check_ranges(alone: dict, ranks: list[dict]) -> None:
    """Whole ranges are equal on both ranks, and near those of one rank: the largest of all tokens and features."""
    for name, (value, spec, *_) in alone["tensors"].items():
        if name.endswith(".range"):
            copies = [each["tensors"][name][0] for each in ranks if name in each["tensors"]]
            if spec is None:
                assert all((copy == copies[0]).all() for copy in copies), name
                np.testing.assert_allclose(copies[0], value, rtol=0.15, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(world2: World, directory: Path, case: str):
    check(world2, directory, case)
