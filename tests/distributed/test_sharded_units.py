"""Blocks whose weights are divided: their gradients are those of whole weights, and between uses there is a chunk."""

import numpy as np
import paddle
import pytest
from support.worlds import World

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
