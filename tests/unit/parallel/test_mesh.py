"""Degrees from a configuration, refusals with their arithmetic, and who is in which group."""

import dataclasses
import math
from itertools import product

import pytest
from support.tiny_sizes import MOE

from erniekit.config import Config
from erniekit.models.config import ModelConfig
from erniekit.parallel.mesh import Mesh, ParallelDims, check_model, coordinates, pipe_pairs, rank_lists
from erniekit.utils.errors import ConfigError

NOT_ASKED = -1
DEGREES = [
    ParallelDims(pipeline, data, tensor, expert, sharding, context=math.gcd(data, 2 * tensor))
    for pipeline, data, tensor in product((1, 2, 3), (1, 2, 4, 12), (1, 2))
    for expert, sharding in product((1, 2, 3, 4), (1, 2, 4, 6, 12))
    if data % expert == 0 and data % sharding == 0
]


def _config(pipeline=1, tensor=1, sharding=NOT_ASKED, data=NOT_ASKED, expert=NOT_ASKED, context=NOT_ASKED) -> Config:
    return Config(
        pipeline_parallel_degree=pipeline,
        tensor_parallel_degree=tensor,
        sharding_parallel_degree=sharding,
        data_parallel_degree=data,
        expert_parallel_degree=expert,
        context_parallel_degree=context,
    )


@pytest.mark.parametrize(
    ("config", "world", "expected"),
    [
        (_config(), None, ParallelDims()),
        (_config(pipeline=2, tensor=2), None, ParallelDims(pipeline=2, tensor=2)),
        (_config(data=2, sharding=2), None, ParallelDims(data=4, sharding=2)),
        (_config(data=2), None, ParallelDims(data=2, sharding=2)),  # optimizer state, if divided, over all data ranks
        (_config(data=2, sharding=1), None, ParallelDims(data=2)),
        (_config(expert=4), None, ParallelDims(data=4, expert=4, sharding=4)),
        (_config(expert=2, data=4), None, ParallelDims(data=4, expert=2, sharding=4)),
        # Ranks that share rows are data ranks: of experts and optimizer state, too.
        (_config(context=2), None, ParallelDims(data=2, sharding=2, context=2)),
        (_config(context=2, data=3, sharding=2), None, ParallelDims(data=12, sharding=2, context=2)),
        (_config(context=2, expert=4), None, ParallelDims(data=4, expert=4, sharding=4, context=2)),
        (_config(context=4, expert=2), None, ParallelDims(data=4, expert=2, sharding=4, context=4)),
        (_config(context=2, tensor=2), 8, ParallelDims(tensor=2, data=4, sharding=4, context=2)),
        (_config(), 8, ParallelDims(data=8, sharding=8)),
        (_config(pipeline=2, sharding=2), 8, ParallelDims(pipeline=2, data=4, sharding=2)),
        (_config(pipeline=2, tensor=2, data=2), 8, ParallelDims(2, 2, 2, sharding=2)),
        (_config(expert=2, tensor=2), 8, ParallelDims(tensor=2, data=4, expert=2, sharding=4)),
    ],
)
def test_degrees_of_a_configuration(config: Config, world: int | None, expected: ParallelDims):
    degrees = ParallelDims.from_config(config, world)
    assert degrees == expected
    assert world in (None, degrees.world)


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            _config(expert=4, data=2),
            None,
            r"expert_parallel_degree: 4 does not divide the 2 data ranks \(2 / 4 = 0.50\)",
        ),
        (_config(expert=3), 4, "expert_parallel_degree: 3 does not divide the 4 data ranks"),
        (_config(pipeline=3), 8, r"pipeline_parallel_degree 3 \* data ranks 1 .* = 3 processes, but there are 8"),
        (_config(data=2, tensor=2), 8, r"data ranks 2 .* \* tensor_parallel_degree 2 = 4 processes, but there are 8"),
        (_config(context=3, data=2), 8, r"sharding_parallel_degree 1 \* context_parallel_degree 3.* = 6 processes"),
        (_config(tensor=4), 2, r"tensor_parallel_degree 4 = 4 processes, but there are 2"),
    ],
)
def test_degrees_that_cannot_be_are_refused_with_the_arithmetic(config, world, message):
    with pytest.raises(ConfigError, match=message):
        ParallelDims.from_config(config, world)


MODEL = ModelConfig.from_dict(
    MOE
    | {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 96,
        "moe_num_shared_experts": 2,
        "moe_num_experts": 8,
    }
)


@pytest.mark.parametrize(
    ("degrees", "changes", "message"),
    [
        (
            ParallelDims(tensor=3),
            {"num_attention_heads": 6},
            r"3 does not divide the model's 2 key-value heads \(2 / 3",
        ),
        (ParallelDims(tensor=3), {}, "does not divide the model's 8 attention heads .*Possible: 1, 2, 4, 8"),
        (ParallelDims(tensor=2), {"vocab_size": 97}, "does not divide the model's 97 entries of the vocabulary"),
        (ParallelDims(tensor=2), {"intermediate_size": 49}, "49 features of intermediate_size"),
        (ParallelDims(tensor=2), {"moe_intermediate_size": 5, "moe_num_shared_experts": 1}, "5 features of the shared"),
        (ParallelDims(data=3, expert=3), {}, "expert_parallel_degree .* 3 does not divide the model's 8 experts"),
        (ParallelDims(data=8, expert=8, tensor=2), {}, "16 does not divide the model's 8 experts"),
        (ParallelDims(data=2, expert=2), {"moe_num_experts": 0}, "the model has no experts"),
        (ParallelDims(pipeline=8), {}, "8 stages need a layer each, but the model has 4"),
    ],
)
def test_models_that_do_not_divide_are_refused(degrees: ParallelDims, changes: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        check_model(degrees, dataclasses.replace(MODEL, **changes))


def test_a_model_that_divides_passes():
    check_model(ParallelDims(pipeline=4, data=4, tensor=2, expert=4), MODEL)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_groups_have_the_ranks_of_their_axes(degrees: ParallelDims):
    of_rank = [rank_lists(degrees, rank) for rank in range(degrees.world)]
    places = [coordinates(degrees, rank) for rank in range(degrees.world)]
    assert places == sorted(places) and len(set(places)) == degrees.world  # rank = (p * D + d) * T + t
    for name in of_rank[0]:
        if name != "ends_group":  # every rank has one list, in order, and all who are in it have the same
            for rank, lists in enumerate(of_rank):
                assert rank in lists[name] and list(lists[name]) == sorted(lists[name])
                assert all(of_rank[other][name] == lists[name] for other in lists[name])
    for lists, (pipe, data, tensor) in zip(of_rank, places):

        def who(name: str, lists=lists) -> list[tuple[int, int, int]]:
            return [places[rank] for rank in lists[name]]

        all_data = [(pipe, d, tensor) for d in range(degrees.data)]
        block = data // degrees.expert * degrees.expert
        shard = data // degrees.sharding
        assert who("world_group") == places
        assert who("data_group") == all_data
        assert who("tensor_group") == [(pipe, data, t) for t in range(degrees.tensor)]
        assert who("pipe_group") == [(p, data, tensor) for p in range(degrees.pipeline)]
        row = data // degrees.context
        assert who("context_group") == [place for place in all_data if place[1] // degrees.context == row]
        assert degrees.batch == len({place[1] // degrees.context for place in all_data})
        assert who("expert_group") == all_data[block : block + degrees.expert]
        assert who("expert_data_group") == [place for place in all_data if (place[1] - data) % degrees.expert == 0]
        assert who("shard_group") == [place for place in all_data if place[1] // degrees.sharding == shard]
        assert who("shard_replica_group") == [place for place in all_data if (place[1] - data) % degrees.sharding == 0]
        ends = sorted({(0, data, tensor), (degrees.pipeline - 1, data, tensor)})
        assert who("ends_group") == (ends if (pipe, data, tensor) in ends else [(pipe, data, tensor)])
        # Shards of expert weights: a cut of expert_data_group, never leaving a sharding group.
        held = set(lists["expert_shard_group"])
        assert held <= set(lists["expert_data_group"]) & set(lists["shard_group"])
        assert set(lists["expert_shard_replica_group"]) & held == {places.index((pipe, data, tensor))}
        assert len(held) * len(lists["expert_shard_replica_group"]) == len(lists["expert_data_group"])


def test_pipeline_neighbours_are_connected_in_both_directions():
    assert list(pipe_pairs(ParallelDims(data=2))) == []
    assert set(pipe_pairs(ParallelDims(pipeline=2, tensor=2))) == {(0, 2), (2, 0), (1, 3), (3, 1)}
    assert set(pipe_pairs(ParallelDims(pipeline=3))) == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)}


def test_mesh_of_a_single_process():
    mesh = Mesh.single()
    assert (mesh.world, mesh.rank, mesh.is_first_stage, mesh.is_last_stage) == (1, 0, True, True)
    assert {vars(mesh)[name].size for name in vars(mesh) if name.endswith("_group")} == {1}
