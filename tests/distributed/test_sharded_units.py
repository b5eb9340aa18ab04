"""Blocks whose weights are divided: their gradients are those of whole weights, and between uses there is a chunk."""

import dataclasses
from pathlib import Path

import numpy as np
import paddle
import pytest
from support.equality import keys_for, prepare
from support.worlds import World

from erniekit.checkpoint.model_io import save_model
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.parallel import backend, comm
from erniekit.parallel.grad_sync import GradientSync
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import Group
from erniekit.parallel.sharded_units import ShardedUnits
from erniekit.parallel.zero import ShardedParameters, entries_of

WIDTH, BLOCKS, MICROBATCHES = 5, 3, 2  # 25 and 5 elements: no number of ranks here divides them
NAMES = [f"block{number}.{what}" for number in range(BLOCKS) for what in ("matrix", "gain")]


def start_of(name: str) -> paddle.Tensor:
    shape = [WIDTH, WIDTH] if name.endswith("matrix") else [WIDTH]
    values = np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)
    parameter = paddle.create_parameter(shape, "float32")
    parameter.set_value(values)
    return parameter


def block(parameters: dict[str, paddle.Tensor], number: int, x: paddle.Tensor) -> tuple[paddle.Tensor, dict]:
    """A result, and a side result that has a gradient, too, as a router's numbers have."""
    matrix, gain = parameters[f"block{number}.matrix"], parameters[f"block{number}.gain"]
    y = paddle.tanh(paddle.matmul(x * gain, matrix))
    return x + y, {"size": (y * y).mean()}


def loss_of(blocks: list, rank: int, microbatch: int, reached: int) -> paddle.Tensor:
    """Every block runs, and the loss reaches the first `reached` of them."""
    values = np.random.default_rng([rank, microbatch]).normal(size=(3, WIDTH)).astype(np.float32)
    x, sizes = paddle.to_tensor(values), []
    results = []
    for run in blocks:
        x, side = run(x)
        results.append(x)
        sizes.append(side["size"])
    return results[reached - 1].square().sum() + paddle.add_n(sizes[:reached])


def gradients_of_whole_weights(reached: list[int]) -> dict[str, np.ndarray]:
    parameters = {name: start_of(name) for name in NAMES}
    blocks = [lambda x, number=number: block(parameters, number, x) for number in range(BLOCKS)]
    for rank, depth in enumerate(reached):
        for microbatch in range(MICROBATCHES):
            loss_of(blocks, rank, microbatch, depth).backward()
    return {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}


def train_divided(reached: list[int]) -> dict:
    """A step on every rank: gradients, the most blocks that were whole at a time, and what had memory afterwards."""
    rank, size = backend.world().rank, backend.world().size
    everyone, alone = Group(tuple(range(size)), rank), Group((rank,), 0)
    placement = Placement(everyone, everyone, alone, alone, alone, copies=size)
    tensors = {name: start_of(name) for name in NAMES}
    unit_of = {name: name.split(".")[0] for name in NAMES}
    where = dict.fromkeys(NAMES, placement)
    units = ShardedUnits(tensors, list(entries_of(tensors, where, {}, units=unit_of).values()), limit=26)
    whole: list[int] = []
    gather = units._gather

    def counted(name: str) -> None:
        gather(name)
        whole.append(len({name.split(".")[0] for name, tensor in tensors.items() if tensor._is_initialized()}))

    units._gather = counted
    blocks = [
        units.wrap(f"block{number}", lambda x, number=number: block(tensors, number, x)) for number in range(BLOCKS)
    ]
    parameters = ShardedParameters(tensors.items(), where, units=units, limit=26)
    sync = GradientSync(parameters, zero_stage=3)
    comm.traffic.take()
    sync.begin(MICROBATCHES)
    for microbatch in range(MICROBATCHES):
        loss_of(blocks, rank, microbatch, reached[rank]).backward()
        sync.after_backward()
    gradients = sync.finish()
    return {
        "gradients": {name: parameters.gather(name, chunk) for name, chunk in gradients.items()},
        "whole": max(whole),
        "left": [name for name, tensor in tensors.items() if tensor._is_initialized()],
        "chunks": {name: list(chunk.shape) for name, chunk in units.chunks.items()},
        "values": {name: units.values[name].whole().numpy() for name in NAMES},
    }


# The last case: no rank reaches the last block, which then has no gradient.
@pytest.mark.parametrize("reached", [[3, 3], [3, 1], [1, 3], [2, 2]], ids=str)
def test_gradients_are_those_of_whole_weights_whatever_a_rank_reaches(world2: World, reached: list[int]):
    expected = gradients_of_whole_weights(reached)
    for rank in world2.run(train_divided, reached=reached):
        assert rank["gradients"].keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(rank["gradients"][name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_one_block_is_whole_at_a_time_and_a_chunk_is_left(world2: World):
    for rank in world2.run(train_divided, reached=[3, 2]):
        assert (rank["whole"], rank["left"]) == (1, [])
        for name in NAMES:
            assert rank["chunks"][name] == [13 if name.endswith("matrix") else 3]
            np.testing.assert_array_equal(rank["values"][name], start_of(name).numpy())


def loaded(keys: dict[str, object]) -> tuple[int, int, int, int]:
    """Bytes of a rank's weights: when the model has been built, at the most until then, undivided, of the largest."""
    from paddle.base import core
    from support.memory_truth import allocated
    from support.traffic import stored_weight_bytes

    from erniekit import config
    from erniekit.parallel.mesh import ParallelDims, build_mesh
    from erniekit.training.build import prepare

    cfg = config.load(None, keys, "train")
    mesh = build_mesh(ParallelDims.from_config(cfg, backend.world().size))
    prepared = prepare(cfg, Path(cfg.model_name_or_path), mesh)
    before = allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    model = prepared.build(mesh)
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    sizes = [4 * p.size for _, p in model.named_parameters()]
    return stored_weight_bytes(model), peak, sum(sizes), max(sizes)


@pytest.mark.parametrize("continue_training", [False, True], ids=["drawn", "read"])
def test_one_weight_is_whole_at_a_time_while_they_are_made(world2: World, tmp_path: Path, continue_training: bool):
    prepare(tmp_path)
    config = ModelConfig.from_dir(tmp_path / "dense")
    deep = CausalLM(dataclasses.replace(config, num_hidden_layers=16))
    init_weights(deep, 1)
    save_model(deep, tmp_path / "deep")
    keys = keys_for(str(tmp_path), "deep", 2, sharding="stage3", sharding_parallel_degree=2)
    for kept, peak, whole, largest in world2.run(loaded, keys=keys | {"continue_training": continue_training}):
        assert kept < 0.6 * whole  # the embedding is whole
        assert peak < kept + 2 * largest < whole  # one weight, and a copy of it on its way
