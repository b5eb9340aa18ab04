"""A vision-language model on N ranks has the loss and the gradients of one: images and videos in uneven places, among
them microbatches and ranks that have none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.tiny_vision import CONFIG, Document, packed_row
from support.worlds import World

TOLERANCE = 1e-5

# Of one step, in the order of the data. Data ranks take every second one: the second rank has text alone first.
MICROBATCHES: list[list[Document]] = [
    [[3, (1, 4, 2), 5], [(4, 2, 4), 2, (1, 2, 2), 4]],
    [[9], [14]],
    [[12]],
    [[2, (2, 4, 4), 3, (1, 2, 6), 1], [6]],
    [[4], [(6, 2, 2), 3]],
    [[1, (1, 2, 2), 2]],
    [[8]],
    [[11], [5]],
]
TWO: dict[str, dict[str, Any]] = {
    "dp2": {"data": 2},
    "ep2": {"data": 2, "expert": 2},
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2-interleaved": {"pipeline": 2, "chunks": 2},
    "pp2-recompute": {"pipeline": 2, "recompute": True},
    "ep2-recompute": {"data": 2, "expert": 2, "recompute": True},
}
FOUR: dict[str, dict[str, Any]] = {
    "dp4": {"data": 4},
    "pp2-dp2": {"pipeline": 2, "data": 2},
    "pp2-ep2": {"pipeline": 2, "data": 2, "expert": 2},
    "pp2-interleaved-ep2": {"pipeline": 2, "data": 2, "expert": 2, "chunks": 2},
    "tp2-sp-dp2": {"tensor": 2, "data": 2, "sequence": True},
    "tp2-ep2": {"tensor": 2, "data": 2, "expert": 2},
    "tp2-sp-ep2": {"tensor": 2, "data": 2, "expert": 2, "sequence": True},
    "pp2-tp2": {"pipeline": 2, "tensor": 2},
    "pp2-tp2-sp": {"pipeline": 2, "tensor": 2, "sequence": True},
}


def one_step(
    microbatches: Sequence[Sequence[Document]],
    sequence: bool = False,
    chunks: int = 1,
    recompute: bool = False,
    balance: bool = True,
    freeze_config: tuple[str, ...] = (),
    weigh_first: bool = False,
    **degrees: int,
) -> dict[str, Any]:
    """Forward and backward of one step on this rank: the loss, the routers' loads, its parameters' gradients as
    name -> (array or None, spec, index, count), and how data ranks divide the patches.
    """
    from erniekit.config.schema import Config
    from erniekit.models import activation_checkpoint
    from erniekit.models.config import ModelConfig
    from erniekit.models.decoder import CausalLM
    from erniekit.models.init import init_weights
    from erniekit.models.parallelize import parallelize, placements, rank_shard_of
    from erniekit.models.pipeline_layout import assign_layers, parameter_chunks, plan_actions, schedule_of
    from erniekit.moe.experts import Experts
    from erniekit.nn.shard import named_shard_specs
    from erniekit.parallel import pipeline
    from erniekit.parallel.grad_sync import GradientSync
    from erniekit.parallel.mesh import Mesh, ParallelDims, build_mesh
    from erniekit.parallel.zero import ShardedParameters
    from erniekit.training.forward_step import TrainStage
    from erniekit.training.freezing import freeze
    from erniekit.training.recipes.causal import CausalRecipe
    from erniekit.training.reduce_metrics import global_counts, global_sums

    cfg = Config(
        max_seq_len=64,
        virtual_pp_degree=chunks,
        moe_aux_loss_lambda=0.01,
        moe_z_loss_lambda=0.001,
        moe_orthogonal_loss_lambda=0.01,
        freeze_config=freeze_config,
    )
    mesh = build_mesh(ParallelDims(**degrees)) if degrees else Mesh.single()
    config = ModelConfig.from_dict(CONFIG)
    own_chunks = assign_layers(cfg, config, mesh.degrees.pipeline)[mesh.pipe]
    model = CausalLM(config, rank_shard_of(mesh, own_chunks))
    init_weights(model, 7)
    parallelize(model, mesh, sequence, own_chunks, balance)
    freeze(model, cfg)
    if recompute:
        activation_checkpoint.apply(model.model, activation_checkpoint.RecomputeOptions())
    for module in model.sublayers() if weigh_first else ():
        if isinstance(module, Experts):
            module.takes_weights = True
    model.train()
    recipe = CausalRecipe(cfg, 0)
    mine = range(mesh.data, len(microbatches), mesh.degrees.data)
    batches = [packed_row(microbatches[number], number) for number in mine]
    parts = parameter_chunks(model, own_chunks)
    sync = GradientSync(ShardedParameters(model.named_parameters(), placements(model, mesh, False), parts))
    counts = global_counts(recipe, batches, mesh)
    stage = TrainStage(cfg, model, recipe, batches, counts, sync.after_backward)
    sync.begin(len(batches))
    stages = mesh.degrees.pipeline
    actions = plan_actions(schedule_of(cfg), stages, len(own_chunks), mesh.blocking_sends, mesh.pipe, len(batches))
    pipeline.run(actions, stage, mesh.pipe_group.ranks)
    found = sync.finish()
    sums = global_sums(stage.sums(stage.on_device.fetch()), mesh)
    specs = named_shard_specs(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        spec = specs.get(name)
        array = found[name].numpy().reshape(parameter.shape) if name in found else None
        gradients[name] = (array, spec, *((0, 1) if spec is None else model.shard.share(spec)))
    loads = {router: stats.usage.tolist() for router, stats in sums.routers.items()}
    return {"loss": sums.loss, "loads": loads, "gradients": gradients, "patches": stage.patch_load}


def compare(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> float:
    """Largest difference of the loss or of any gradient; together the ranks must have every gradient."""
    from erniekit.nn.shard import unshard

    loads = {router: load for rank in ranks for router, load in rank["loads"].items()}
    assert loads == alone["loads"], "the routers of both modalities choose as on one rank"
    worst = max(abs(rank["loss"] - alone["loss"]) for rank in ranks)
    for name, (whole, *_) in alone["gradients"].items():
        shares: dict[int, np.ndarray | None] = {}
        for rank in ranks:
            if name in rank["gradients"]:
                array, spec, index, count = rank["gradients"][name]
                assert (array is None) == (whole is None), name
                shares.setdefault(index, array)
        assert sorted(shares) == list(range(count)), name
        if whole is not None:
            pieces = [shares[index] for index in range(count)]
            joined = pieces[0] if spec is None else unshard(pieces, spec)
            worst = max(worst, float(np.abs(joined - whole).max()))
    return worst


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = one_step(MICROBATCHES)
    gradients = found["gradients"]
    assert all(array is not None and array.any() for array, *_ in gradients.values()), "every parameter is trained"
    assert {modality for _, modality in found["loads"]} == {0, 1}
    return found


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_are_one(world2: World, alone: dict[str, Any], case: str) -> None:
    ranks = world2.run(one_step, microbatches=MICROBATCHES, **TWO[case])
    assert compare(ranks, alone) < TOLERANCE


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_are_one(world4: World, alone: dict[str, Any], case: str) -> None:
    ranks = world4.run(one_step, microbatches=MICROBATCHES, **FOUR[case])
    assert compare(ranks, alone) < TOLERANCE


@pytest.mark.parametrize("balance", [True, False])
def test_data_ranks_divide_the_patches(world2: World, alone: dict[str, Any], balance: bool) -> None:
    """One rank has all or most patches of each microbatch: 44 of 44, 44 of 44, 24 of 28. Divided by images and pairs
    of frames: 24, 32 and 16 on the busiest.
    """
    ranks = world2.run(one_step, microbatches=MICROBATCHES, balance=balance, **TWO["dp2"])
    assert compare(ranks, alone) < TOLERANCE
    assert [rank["patches"] for rank in ranks] == [(112, 72, 58.0) if balance else None] * 2


@pytest.mark.parametrize("case", ["tp2-sp-dp2", "tp2-sp-ep2", "pp2-ep2"])
def test_four_ranks_that_encode_their_own_pictures_are_one(world4: World, alone: dict[str, Any], case: str) -> None:
    ranks = world4.run(one_step, microbatches=MICROBATCHES, balance=False, **FOUR[case])
    assert compare(ranks, alone) < TOLERANCE


# Every row of the second data rank is of text alone.
LOPSIDED = [MICROBATCHES[0], [[9], [14]], MICROBATCHES[3], [[8]], MICROBATCHES[5], [[12]]]


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("case", ["dp2", "ep2", "ep2-recompute"])
def test_a_rank_whose_tokens_are_all_text(world2: World, case: str, balance: bool) -> None:
    ranks = world2.run(one_step, microbatches=LOPSIDED, balance=balance, **TWO[case])
    assert compare(ranks, one_step(LOPSIDED)) < TOLERANCE


def test_routing_weights_that_travel_with_the_rows(world2: World) -> None:
    """As with FP8. The gradients of the weights come back, also from the rank that has no tokens of pictures."""
    ranks = world2.run(one_step, microbatches=LOPSIDED, weigh_first=True, **TWO["ep2"])
    assert compare(ranks, one_step(LOPSIDED)) < TOLERANCE


@pytest.mark.parametrize("case", ["dp2", "ep2", "pp2"])
def test_a_step_of_text_alone_leaves_vision_without_gradients(world2: World, case: str) -> None:
    text: list[list[Document]] = [[[9]], [[4], [5]], [[7]], [[12]]]
    alone = one_step(text)
    without = [name for name, (array, *_) in alone["gradients"].items() if array is None]
    assert any(name.startswith("model.vision_model.") for name in without)
    ranks = world2.run(one_step, microbatches=text, **TWO[case])
    assert compare(ranks, alone) < TOLERANCE


@pytest.mark.parametrize("case", ["dp2", "ep2", "ep2-recompute"])
def test_a_rank_without_rows_takes_part(world2: World, case: str) -> None:
    """The data of the second rank has ended: its last microbatch has no tokens, that of the first has pictures."""
    ranks = world2.run(one_step, microbatches=[*MICROBATCHES[:5], []], **TWO[case])
    assert compare(ranks, one_step(MICROBATCHES[:5])) < TOLERANCE


FROZEN: dict[str, tuple[str, ...]] = {"lm": ("freeze_lm",), "vision": ("freeze_vision",)}


@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("case", ["dp2", "ep2", "tp2-sp", "ep2-recompute", "pp2", "pp2-interleaved", "pp2-recompute"])
def test_two_ranks_of_which_some_have_no_pictures_train_a_part(world2: World, case: str, part: str) -> None:
    """Below the first vision expert only pictures need gradients if the decoder is frozen; a rank without any must not
    stand aside.
    """
    ranks = world2.run(one_step, microbatches=MICROBATCHES, freeze_config=FROZEN[part], **TWO[case])
    assert compare(ranks, one_step(MICROBATCHES, freeze_config=FROZEN[part])) < TOLERANCE


@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("case", ["dp2", "ep2"])
def test_a_rank_whose_tokens_are_all_text_trains_a_part(world2: World, case: str, part: str) -> None:
    """If the decoder is frozen, the routers of vision are the only ones with a loss, and this rank gives them none."""
    ranks = world2.run(one_step, microbatches=LOPSIDED, freeze_config=FROZEN[part], **TWO[case])
    assert compare(ranks, one_step(LOPSIDED, freeze_config=FROZEN[part])) < TOLERANCE


@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("case", ["pp2-interleaved-ep2", "tp2-sp-ep2", "tp2-sp-dp2"])
def test_four_ranks_of_which_some_have_no_pictures_train_a_part(world4: World, case: str, part: str) -> None:
    ranks = world4.run(one_step, microbatches=MICROBATCHES, freeze_config=FROZEN[part], **FOUR[case])
    assert compare(ranks, one_step(MICROBATCHES, freeze_config=FROZEN[part])) < TOLERANCE
