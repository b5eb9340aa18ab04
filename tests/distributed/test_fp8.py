"""Two ranks train in FP8 as one does: the experts, or all projections, emulated on a CPU."""

from pathlib import Path

import pytest
from support import sixteen_bits
from support.equality import compare, train_some
from support.sixteen_bits import keys_of
from support.worlds import World

EXPERTS = {"fp8": "blockwise", "fp8_statistics_steps": 2}
EVERYWHERE = EXPERTS | {"fp8_modules": "experts,shared_experts,mlp,attention"}
SHARD2 = {"sharding_parallel_degree": 2, "sharding": "stage1"}
TENSOR2 = {"tensor_parallel_degree": 2, "sequence_parallel": True}
PIPE2 = {"pipeline_parallel_degree": 2}
MTP = {"num_nextn_predict_layers": 1}
CASES = {
    "pp2": (1, EVERYWHERE, PIPE2 | MTP),
    "ep2-sharding": (2, EXPERTS, SHARD2 | {"expert_parallel_degree": 2, "recompute": True}),
    "ep2-after": (2, EXPERTS | {"fp8_routing_weight": "after"}, {"expert_parallel_degree": 2}),
    "tp2-sp": (1, EXPERTS, TENSOR2 | MTP),
    "tp2-sp-everywhere": (1, EVERYWHERE, TENSOR2),
    "lora-ep2": (2, EVERYWHERE | sixteen_bits.LORA | {"learning_rate": 1e-3}, {"expert_parallel_degree": 2}),
    # Some microbatches of a rank have no picture, and the experts of pictures multiply by routing weights.
    "pictures-ep2": (2, EXPERTS, {"expert_parallel_degree": 2}),
}
QUICK = ("pp2", "ep2-sharding")
# Losses of 5 to 8. bf16 alone is allowed 0.015 (test_emulation.py). Tiles of a weight's gradient hold other tokens
# where the ranks have a part of them, and those of a tensor rank's share of a matrix other values.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    sixteen_bits.prepare(path)
    return path


def check(world: World, directory: Path, case: str) -> None:
    data_ranks, recipe, layout = CASES[case]
    shared = recipe | {name: value for name, value in layout.items() if name in MTP}
    model = "vl" if case.startswith("pictures") else "moe"
    alone = train_some(keys_of(directory, model, "bf16", **shared))
    ranks = world.run(train_some, keys=keys_of(directory, model, "bf16", data_ranks, **(recipe | layout)))
    assert any(name.startswith("fp8_zeroed") for name in alone["steps"][1])
    for each in ranks:
        for number, step in enumerate(each["steps"]):
            assert step["norm"] == pytest.approx(alone["steps"][number]["norm"], rel=0.1)
    for each in (alone, *ranks):  # a token near a tie goes to another expert, which router numbers show at once
        each["steps"] = [{"loss": step["loss"]} for step in each["steps"]]
    losses, parameters = compare(ranks, alone)  # also: copies on both ranks are equal bit for bit
    print(f"{case}: losses {losses:.5f}, parameters {parameters:.2e}")
    assert losses < TOLERANCE


@pytest.mark.parametrize("case", QUICK)
def test_two_ranks_train_as_one(world2: World, directory: Path, case: str):
    check(world2, directory, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_so_it_is_with_other_layouts(world2: World, directory: Path, case: str):
    check(world2, directory, case)
