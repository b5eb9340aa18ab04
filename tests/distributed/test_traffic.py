"""Bytes, memory and waiting of a step equal the formulas of erniekit/parallel, byte for byte."""

from pathlib import Path

import pytest
from support.equality import keys_for, prepare
from support.traffic import measure
from support.worlds import World

DATA2 = {"data_parallel_degree": 2}
TENSOR2 = {"tensor_parallel_degree": 2}
SEQUENCE2 = TENSOR2 | {"sequence_parallel": True}
EXPERT2 = {"expert_parallel_degree": 2}
STAGE3 = {"sharding_parallel_degree": 2, "sharding": "stage3"}
CONTEXT2 = {"context_parallel_degree": 2}
HEADS2 = CONTEXT2 | {"cp_comm_type": "a2a"}
PIPE2 = {"pipeline_parallel_degree": 2}

# model, data ranks, keys
TWO = {
    "dense-dp2": ("dense", 2, DATA2),
    "dense-sharding2": ("dense", 2, {"sharding_parallel_degree": 2, "sharding": "stage1"}),
    "moe-sharding2-stage2": ("moe", 2, {"sharding_parallel_degree": 2, "sharding": "stage2"}),
    "dense-stage3": ("dense", 2, STAGE3),
    "moe-stage3-frozen": ("moe", 2, STAGE3 | {"frozen_parameters": [".*experts.*"]}),
    "dense-tp2": ("dense", 1, TENSOR2),
    "untied-tp2-sp": ("untied", 1, SEQUENCE2),
    "moe-tp2": ("moe", 1, TENSOR2),
    "moe-tp2-sp": ("moe", 1, SEQUENCE2),
    "moe-ep2": ("moe", 2, EXPERT2),
    "moe-ep2-recompute": ("moe", 2, EXPERT2 | {"recompute": True}),
    "dense-cp2-recompute": ("dense", 1, CONTEXT2 | {"recompute": True}),
    "moe-cp2": ("moe", 1, CONTEXT2),
    "moe-cp2-heads": ("moe", 1, HEADS2),
    "vl-dp2": ("vl", 2, DATA2),
    "vl-ep2": ("vl", 2, EXPERT2),
    "vl-dp2-frozen": ("vl", 2, DATA2 | {"frozen_parameters": ["vision_transformer", "resampler"]}),
    "dense-pp2": ("dense", 1, PIPE2),
    "moe-pp2-interleaved": ("moe", 1, PIPE2 | {"virtual_pp_degree": 2}),
    "dense-pp2-memory": ("dense", 1, PIPE2 | {"virtual_pp_degree": 2, "pipeline_schedule": "memory_efficient"}),
}
FOUR = {
    "moe-tp2-sp-ep2": ("moe", 2, SEQUENCE2 | EXPERT2),
    "moe-pp2-ep2": ("moe", 2, PIPE2 | EXPERT2),
    "dense-stage3-4": ("dense", 4, STAGE3 | {"sharding_parallel_degree": 4}),
    "moe-ep2-stage3": ("moe", 4, EXPERT2 | STAGE3 | {"sharding_parallel_degree": 4}),
    "untied-tp2-sp-stage3": ("untied", 2, SEQUENCE2 | STAGE3),
    "dense-pp2-stage3": ("dense", 2, PIPE2 | STAGE3),
    "moe-ep4": ("moe", 4, {"expert_parallel_degree": 4}),
    "dense-cp4": ("dense", 1, {"context_parallel_degree": 4}),
    "moe-tp2-sp-cp2-ep2": ("moe", 1, SEQUENCE2 | CONTEXT2 | EXPERT2),
    "dense-pp4": ("dense", 1, {"pipeline_parallel_degree": 4}),
    "vl-pp2-dp2": ("vl", 2, PIPE2 | DATA2),
    "untied-pp2-tp2-sp": ("untied", 1, PIPE2 | SEQUENCE2),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traffic")
    prepare(path)
    return path


def measured(world: World, directory: Path, model: str, data_ranks: int, keys: dict[str, object]) -> list[dict]:
    return world.run(measure, keys=keys_for(str(directory), model, data_ranks, **keys))


def check(ranks: list[dict]) -> None:
    for rank, result in enumerate(ranks):
        for name in ("sent", "state", "weights", "peak"):
            counted, formula = result[name]
            assert counted == formula, f"rank {rank}: {name}"


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_send_what_the_formula_says(world2: World, directory: Path, case: str):
    ranks = measured(world2, directory, *TWO[case])
    check(ranks)
    if case == "moe-ep2":  # the formula was tried on unequal loads: what goes away is not what comes back
        assert any(out != back for out, back in ranks[0]["away"])
    if case.startswith("vl"):
        assert all(rank["divided"] for rank in ranks), "some pictures are encoded on another rank"


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_send_what_the_formula_says(world4: World, directory: Path, case: str):
    check(measured(world4, directory, *FOUR[case]))


def test_every_token_goes_to_the_experts_of_one_rank(world2: World, directory: Path):
    ranks = world2.run(measure_one_sided, keys=keys_for(str(directory), "moe", 2, **EXPERT2))
    check(ranks)
    assert all(out == 0 < back for out, back in ranks[0]["away"])
    assert all(back == 0 < out for out, back in ranks[1]["away"])


def measure_one_sided(keys: dict[str, object]) -> dict:
    """`measure` with routers that choose the first experts for every token."""
    import paddle

    from erniekit.moe import layer

    route = layer.route

    def one_sided(logits, bias, *others):
        return route(logits, bias - 10.0 * paddle.arange(bias.shape[0], dtype=bias.dtype), *others)

    layer.route = one_sided
    try:
        return measure(keys)
    finally:
        layer.route = route
