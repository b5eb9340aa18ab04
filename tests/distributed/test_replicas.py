"""A parameter that differs between ranks which should hold the same is found, and named."""

import paddle
import pytest
from support.tiny_sizes import MOE
from support.worlds import World

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.parallelize import parallelize, rank_shard_of
from erniekit.models.sharded_blocks import divide
from erniekit.parallel.mesh import ParallelDims, build_mesh
from erniekit.training.replica_check import ReplicaCheck
from erniekit.utils.errors import TrainError


def check(degrees: dict[str, int], broken: tuple[int, str] | None) -> str:
    """What the check says on this rank after `broken` = (rank, parameter) lost a bit."""
    mesh = build_mesh(ParallelDims(**degrees))
    config = ModelConfig.from_dict(MOE | {"vocab_size": 64})
    model = CausalLM(config, rank_shard_of(mesh, [(0, 1)]))
    init_weights(model, 1)
    parallelize(model, mesh, sequence_parallel=False)
    if broken is not None and mesh.rank == broken[0] and mesh.degrees.sharding == 1:
        parameter = dict(model.named_parameters())[broken[1]]
        with paddle.no_grad():
            parameter.set_value(parameter * (1 + 1e-7))
    if mesh.degrees.sharding > 1:
        divide(model, mesh)
    if broken is not None and mesh.rank == broken[0] and model.units is not None:
        model.units.values[broken[1]].chunk.scale_(1 + 1e-7)
    try:
        ReplicaCheck(model, mesh)(7)
    except TrainError as error:
        return str(error)
    return ""


NORM, EXPERTS = "model.norm.weight", "model.layers.1.mlp.experts.down_proj.weight"


DEGREES = [{"data": 4}, {"tensor": 2, "data": 2}, {"data": 4, "expert": 2}, {"data": 4, "sharding": 2}]


@pytest.mark.parametrize("degrees", DEGREES)
def test_equal_copies_pass(world4: World, degrees: dict[str, int]):
    assert world4.run(check, degrees=degrees, broken=None) == [""] * 4


@pytest.mark.parametrize(
    ("degrees", "broken", "told"),
    [
        ({"data": 4}, (2, NORM), [0, 1, 2, 3]),
        ({"data": 4, "expert": 2}, (3, EXPERTS), [1, 3]),  # the ranks that hold the same experts
        ({"tensor": 2, "data": 2}, (1, NORM), [0, 1, 3]),  # its data ranks and its tensor ranks
        ({"data": 4, "sharding": 2}, (2, EXPERTS), [0, 2]),  # the ranks that have the same chunk
    ],
)
def test_a_different_copy_is_named(world4: World, degrees: dict[str, int], broken: tuple[int, str], told: list[int]):
    messages = world4.run(check, degrees=degrees, broken=broken)
    assert [rank for rank, message in enumerate(messages) if message] == told
    assert all(broken[1] in messages[rank] for rank in told)
    assert len(told) < 4 or f"but on {broken[0]} it differs (1 parameter differs" in messages[0]
