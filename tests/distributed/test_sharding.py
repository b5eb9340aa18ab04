"""Several ranks against one process that has all gradients: the same parameters, norms and optimizer state."""

import math

import numpy as np
import paddle
import pytest
from support.optimizer_state import state_arrays
from support.traffic import stored_gradient_bytes
from support.worlds import World

from erniekit.parallel import backend, comm
from erniekit.parallel.grad_clip import clip_, global_norm
from erniekit.parallel.grad_sync import GradientSync
from erniekit.parallel.memory import gradient_bytes, state_bytes
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import ALONE, Group
from erniekit.parallel.traffic import gradient_sync_bytes
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import AdamW, ParamRule

# Numbers of size 1, five steps; a rank adds gradients in another order than one process.
ATOL = 1e-6
STEPS, MICROBATCHES, LR, MAX_NORM = 5, 2, 1e-2, 1.0

# Sizes that no number of ranks divides; "some" has no gradient on rank 0, "never" on none; rank r holds the experts of
# place r % 2, so that four ranks share them in twos and two ranks not at all.
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "experts": (4, 3), "some": (1,), "never": (5,)}


def start_of(name: str) -> np.ndarray:
    shape = SHAPES[name.rstrip("01")]
    return np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)


def gradient(rank: int, step: int, microbatch: int, name: str) -> np.ndarray | None:
    if name == "never" or (name == "some" and rank == 0):
        return None
    seed = [rank, step, microbatch, *name.encode()]
    return np.random.default_rng(seed).normal(size=SHAPES[name]).astype(np.float32)


def parameter(values: np.ndarray) -> paddle.Tensor:
    p = paddle.create_parameter(list(values.shape), "float32")
    p.set_value(values)
    return p


def backward(parameters: dict[str, paddle.Tensor], gradients: dict[str, np.ndarray | None]) -> None:
    terms = [(parameters[name] * paddle.to_tensor(g)).sum() for name, g in gradients.items() if g is not None]
    paddle.add_n(terms).backward()


def adamw(parameters: ShardedParameters) -> AdamW:
    rules = {name: ParamRule(1.0, 0.0 if name == "b" else 0.1) for name in parameters.tensors}
    return AdamW(parameters, rules, 0.9, 0.95, 1e-8)


def finish_step(sync: GradientSync, optimizer: AdamW, world: Group) -> float:
    gradients = sync.finish()
    norm = global_norm(gradients, sync.parameters.entries, world)
    clip_(gradients, norm, MAX_NORM)
    optimizer.step(gradients, LR)
    sync.clear()
    return norm


def group(ranks: list[int]) -> Group:
    return Group(tuple(ranks), ranks.index(backend.world().rank))


def data_placement(ranks: list[int], shard: int) -> Placement:
    """Data ranks that cut a parameter's state over `shard` adjacent ones (as many as there are)."""
    alone, shard = group([backend.world().rank]), min(shard, len(ranks))
    place = ranks.index(backend.world().rank)
    first = place // shard * shard
    replicas = ranks[place % shard :: shard]
    cut = group(ranks[first : first + shard])
    return Placement(group(ranks), cut, group(replicas), alone, alone, copies=len(ranks))


def sharded_parameters(shard: int) -> ShardedParameters:
    rank, world = backend.world().rank, list(range(backend.world().size))
    experts = data_placement([r for r in world if r % 2 == rank % 2], shard)
    placements = dict.fromkeys(SHAPES, data_placement(world, shard)) | {"experts": experts}
    names = {name: f"experts{rank % 2}" if name == "experts" else name for name in SHAPES}
    parameters = [(name, parameter(start_of(stored))) for name, stored in names.items()]
    # limit 16: several buckets, and one parameter ("a") that fills one
    return ShardedParameters(parameters, placements, limit=16)


def train(stage: int, shard: int, overlap: bool, state: dict[str, np.ndarray] | None, first: int) -> dict:
    """The steps first .. STEPS on every rank."""
    rank, parameters = backend.world().rank, sharded_parameters(shard)
    sync, optimizer = GradientSync(parameters, stage, overlap=overlap), adamw(parameters)
    entries = list(parameters.entries.values())
    if state is not None:
        mine = {key.replace(f"experts{rank % 2}", "experts"): array for key, array in state.items()}
        for key in optimizer.state_shapes():
            optimizer.load_state_array(key, mine[key])
        for name, p in parameters.tensors.items():
            p.set_value(mine[name])
    norms, stored, sent = [], [], []
    comm.traffic.take()
    for step in range(first, STEPS):
        sync.begin(MICROBATCHES)
        for microbatch in range(MICROBATCHES):
            backward(parameters.tensors, {name: gradient(rank, step, microbatch, name) for name in SHAPES})
            sync.after_backward()
            stored.append(stored_gradient_bytes(sync))
        norms.append(finish_step(sync, optimizer, backend.world_group()))
        sent.append(comm.traffic.take())
    formula = gradient_sync_bytes(parameters.buckets, stage, MICROBATCHES, True, backend.world().size)
    return {
        "parameters": {name: p.numpy() for name, p in parameters.tensors.items()},
        "norms": norms,
        "state": state_arrays(optimizer),
        "state bytes": (optimizer.state_bytes(), state_bytes(entries)),
        "gradient bytes": (max(stored), gradient_bytes(entries, stage, True)),
        "sent": (sent, [{kind: n for kind, n in formula.items() if n}] * len(sent)),
    }


def train_alone(ranks: int, until: int = STEPS) -> tuple[dict[str, np.ndarray], list[float], dict[str, np.ndarray]]:
    """One process with the sum of all ranks' gradients: parameters, norms, state."""
    names = [name for name in SHAPES if name != "experts"] + ["experts0", "experts1"]
    parameters = ShardedParameters.single([(name, parameter(start_of(name))) for name in names])
    sync, optimizer = GradientSync(parameters), adamw(parameters)
    norms = []
    for step in range(until):
        total: dict[str, np.ndarray] = {}
        for rank in range(ranks):
            for microbatch in range(MICROBATCHES):
                for name in SHAPES:
                    part = gradient(rank, step, microbatch, name)
                    if part is not None:
                        key = f"experts{rank % 2}" if name == "experts" else name
                        total[key] = total.get(key, np.float64(0.0)) + part.astype(np.float64)
        backward(parameters.tensors, {name: sums.astype(np.float32) for name, sums in total.items()})
        norms.append(finish_step(sync, optimizer, ALONE))
    return {name: p.numpy() for name, p in parameters.tensors.items()}, norms, state_arrays(optimizer)


def check_equal(results: list[dict], ranks: int, norms_from: int = 0) -> None:
    parameters, norms, state = train_alone(ranks)
    for rank, result in enumerate(results):
        for name, values in result["parameters"].items():
            stored = f"experts{rank % 2}" if name == "experts" else name
            np.testing.assert_allclose(values, parameters[stored], atol=ATOL, rtol=0, err_msg=f"rank {rank} {name}")
        for key, array in result["state"].items():
            stored = key.replace("experts", f"experts{rank % 2}")
            np.testing.assert_allclose(array, state[stored], atol=ATOL, rtol=0, err_msg=f"rank {rank} {key}")
        assert result["norms"] == results[0]["norms"]  # the same bits on every rank
        np.testing.assert_allclose(result["norms"], norms[norms_from:], rtol=1e-6)


CASES = [(0, 1, False), (0, 1, True), (1, 2, False), (1, 2, True), (2, 2, False), (2, 2, True)]
MORE = [(1, 4, False), (1, 4, True), (2, 4, False), (2, 4, True)]


@pytest.mark.parametrize(("stage", "shard", "overlap"), CASES)
def test_two_ranks_equal_one(world2: World, stage: int, shard: int, overlap: bool):
    results = world2.run(train, stage=stage, shard=shard, overlap=overlap, state=None, first=0)
    check_equal(results, 2)
    for result in results:
        assert result["sent"][0] == result["sent"][1]
        assert result["state bytes"][0] == result["state bytes"][1]


@pytest.mark.parametrize(("stage", "shard", "overlap"), CASES + MORE)
def test_four_ranks_equal_one(world4: World, stage: int, shard: int, overlap: bool):
    """Experts are shared by two of the four."""
    results = world4.run(train, stage=stage, shard=shard, overlap=overlap, state=None, first=0)
    check_equal(results, 4)
    for result in results:
        assert result["sent"][0] == result["sent"][1]
        assert result["state bytes"][0] == result["state bytes"][1]


def test_stage_2_keeps_chunks_only(world4: World):
    for result in world4.run(train, stage=2, shard=4, overlap=False, state=None, first=0):
        measured, formula = result["gradient bytes"]
        assert measured == formula < 4 * sum(math.prod(shape) for shape in SHAPES.values()) / 2


@pytest.mark.parametrize(("stage", "shard"), [(0, 1), (1, 4), (2, 2)])
def test_four_ranks_load_the_optimizer_state_of_one_process(world4: World, stage: int, shard: int):
    """The state of one process after two steps, taken apart over the ranks, and three more steps."""
    parameters, _, state = train_alone(4, until=2)
    check_equal(world4.run(train, stage=stage, shard=shard, overlap=False, state=parameters | state, first=2), 4, 2)


def misshapen(stage: int) -> str:
    parameters = sharded_parameters(2)
    optimizer = adamw(parameters)
    with pytest.raises(ValueError, match=r"a/moment1: shape \(8,\), not \(3, 5\)"):
        optimizer.load_state_array("a/moment1", np.zeros(8, np.float32))
    return GradientSync(parameters, stage).memory_line()


def test_a_chunk_is_refused_as_optimizer_state(world2: World):
    assert all("sharding stage 1" in line for line in world2.run(misshapen, stage=1))


# Tensor ranks and ends


def mixed(stage: int) -> tuple[dict[str, np.ndarray], float, float]:
    """World of 4 as data x tensor (rank = 2 d + t): which placements there are besides plain data parallelism."""
    rank = backend.world().rank
    d, t = divmod(rank, 2)
    alone, data, tensor = group([rank]), group([t, 2 + t]), group([2 * d, 2 * d + 1])
    shard, replica = (data, alone) if stage else (alone, data)
    placements = {
        "divided": Placement(data, shard, replica, alone, alone, copies=2),  # each tensor rank has its own half
        "whole": Placement(data, shard, replica, alone, alone, copies=4),  # equal gradients on the tensor ranks
        "partial": Placement(data, shard, replica, tensor, alone, copies=4),  # a part of the sum on each
        "shared": Placement(data, shard, replica, alone, tensor, copies=4),  # as if the tensor ranks were the two ends
        "lone partial": Placement(alone, alone, alone, tensor, alone, copies=2),  # no data ranks, copies on two
    }
    parameters = {name: parameter(np.zeros(5, np.float32)) for name in placements}
    sharded = ShardedParameters(parameters.items(), placements)
    sync = GradientSync(sharded, stage)
    sync.begin(1)
    names = list(placements)
    for i, name in enumerate(names):
        seed = [i, d] if name == "whole" else [i, rank]
        parameters[name].grad = paddle.to_tensor(np.random.default_rng(seed).normal(size=5).astype(np.float32))
    given = {name: p.grad.numpy() for name, p in parameters.items()}
    sync.after_backward()
    gradients = sync.finish()
    total = {name: sharded.gather(name, g) for name, g in gradients.items()}
    return given, total, global_norm(gradients, sharded.entries, group([0, 1, 2, 3]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_partial_sums_and_shared_ends_are_added_up_and_counted_once(world4: World, stage: int):
    results = world4.run(mixed, stage=stage)
    given = [result[0] for result in results]

    def summed(name: str, ranks: list[int]) -> np.ndarray:
        return np.sum([given[rank][name] for rank in ranks], axis=0)

    squares = 0.0
    for rank, (_, total, _) in enumerate(results):
        d, t = divmod(rank, 2)
        ranks_of = {
            "divided": [t, 2 + t],
            "whole": [t, 2 + t],
            "partial": [0, 1, 2, 3],
            "shared": [0, 1, 2, 3],
            "lone partial": [2 * d, 2 * d + 1],
        }
        for name, ranks in ranks_of.items():
            np.testing.assert_allclose(total[name], summed(name, ranks), atol=ATOL)
        # distinct tensors: rank 0's of everything, rank 1's half of "divided", the other pair's "lone partial"
        names = {0: list(ranks_of), 1: ["divided"], 2: ["lone partial"], 3: []}[rank]
        squares += sum(float((total[name].astype(np.float64) ** 2).sum()) for name in names)
    assert len({norm for *_, norm in results}) == 1
    assert results[0][2] == pytest.approx(math.sqrt(squares), rel=1e-6)


# When buckets are sent


def interleaved(stage: int) -> tuple[dict[str, np.ndarray], dict[str, int], list[list[str]]]:
    """Two chunks of a model whose backward passes alternate, as those of a pipeline stage do."""
    world = list(range(backend.world().size))
    names = ["x0", "y0", "x1", "y1"]
    parameters = {name: parameter(np.ones(3, np.float32)) for name in names}
    placements = dict.fromkeys(names, data_placement(world, 2))
    chunks = {name: int(name[1]) for name in names}
    sharded = ShardedParameters(parameters.items(), placements, chunks)
    sync = GradientSync(sharded, stage, overlap=True)
    early = []
    for _ in range(2):
        comm.traffic.take()
        sync.begin(2)
        for chunk in (1, 0, 1, 0):
            backward(parameters, {f"{x}{chunk}": np.full(3, 1.0 + chunk, np.float32) for x in "xy"})
            early.append([name for name in names if chunks[name] == chunk and parameters[name].grad is None])
            sync.after_backward(chunk)
        whole = {name: sharded.gather(name, g) for name, g in sync.finish().items()}
        sent = comm.traffic.take()
        sync.clear()
    return whole, sent, early


@pytest.mark.parametrize(("stage", "times"), [(1, 1), (2, 2)])
def test_model_chunks_are_sent_by_their_own_passes_during_backward(world2: World, stage: int, times: int):
    for whole, sent, early in world2.run(interleaved, stage=stage):
        for name, values in whole.items():
            assert values.tolist() == [2 * 2 * (1.0 + int(name[1]))] * 3
        # two buckets (chunks) of 2 x (2 + 2 elements, 2 flags); gathered by the test itself: 4 times 2 elements
        assert sent == {"reduce_scatter": times * 2 * 6 * 4, "all_gather": 4 * 2 * 4}
        always = [["x1", "y1"], ["x0", "y0"]]
        if stage == 2:  # every pass sends, once the first has shown how many gradients there are
            assert early == [[], [], *always, *always, *always]
        else:  # only the last pass of each chunk
            assert early == [[], [], *always, [], [], *always]


def shared_by_recomputed_blocks() -> tuple[np.ndarray, int]:
    """A parameter that two recomputed blocks share gets its gradient in two pieces."""
    from paddle.distributed.fleet.utils import recompute

    w, world = parameter(np.eye(3, dtype=np.float32)), [0, 1]
    sync = GradientSync(ShardedParameters([("w", w)], {"w": data_placement(world, 1)}), overlap=True)
    x = paddle.ones([1, 3])
    x.stop_gradient = False
    for _ in range(3):
        sync.clear()
        sync.begin(1)
        y = recompute(lambda x: x @ w, recompute(lambda x: x @ w, x))
        y.sum().backward()
        sent = w.grad is None
        sync.after_backward()
        gradients = sync.finish()
    return gradients["w"].numpy(), sent


def test_a_bucket_waits_for_all_pieces_of_a_gradient(world2: World):
    for gradient_w, sent in world2.run(shared_by_recomputed_blocks):
        np.testing.assert_array_equal(gradient_w, np.full([3, 3], 2 * 2.0))  # two pieces, two ranks
        assert sent


def in_16_bit(master_grad: bool) -> tuple[float, int, str]:
    """1 from rank 0 and 2^-9 from rank 1: bf16 keeps 8 bits of their sum, fp32 all."""
    world = [0, 1]
    p = paddle.create_parameter([3], "bfloat16", default_initializer=paddle.nn.initializer.Constant(1.0))
    parameters = ShardedParameters([("w", p)], {"w": data_placement(world, 2)})
    sync, optimizer = GradientSync(parameters, 1, master_grad), adamw(parameters)
    sync.begin(1)
    p.grad = paddle.full([3], [1.0, 2.0**-9][backend.world().rank]).astype("bfloat16")
    sync.after_backward()
    comm.traffic.take()
    whole = parameters.gather("w", sync.finish()["w"].astype("float32"))
    return whole.tolist(), optimizer.state["w"]["master"].shape, optimizer.state_bytes()


@pytest.mark.parametrize(("master_grad", "total"), [(True, 1.0 + 2.0**-9), (False, 1.0)])
def test_16_bit_gradients_add_up_in_fp32_if_asked(world2: World, master_grad: bool, total: float):
    for whole, master_shape, num_bytes in world2.run(in_16_bit, master_grad=master_grad):
        assert whole == [total] * 3
        assert master_shape == [2] and num_bytes == 2 * 12 + 8


def different_models() -> str:
    world = [0, 1]
    name = f"w{backend.world().rank}"
    with pytest.raises(AssertionError, match="hold different parameters") as caught:
        ShardedParameters([(name, parameter(np.zeros(2, np.float32)))], {name: data_placement(world, 1)})
    return str(caught.value)


def test_ranks_with_different_parameters_are_refused(world2: World):
    assert all("(0, 1)" in message for message in world2.run(different_models))
