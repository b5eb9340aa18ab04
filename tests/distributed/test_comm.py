"""Every collective on 2 and 4 ranks against numpy on all ranks' inputs, which the test draws as the ranks do."""

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from support.worlds import World

from erniekit.parallel import backend, comm
from erniekit.parallel.mesh import ParallelDims, build_mesh
from erniekit.parallel.process_group import Group
from erniekit.parallel.tcp_collectives import WHOLE_BYTES

DTYPES = ["float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
SUMMED = [dtype for dtype in DTYPES if dtype != "bool"]
FLOAT8 = "float8_e4m3fn"


@pytest.fixture(params=[2, 4])
def world(request: pytest.FixtureRequest) -> World:
    return request.getfixturevalue(f"world{request.param}")


def _draw(rank: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """What a rank brings: values that the dtype has, and whose sums bfloat16 must round, halves among them."""
    rng = np.random.default_rng([seed, rank])
    values = rng.integers(0, {"bool": 2, "uint8": 60}.get(dtype, 250), shape)
    if dtype in ("float32", "float64"):
        return (values + rng.random(shape)).astype(dtype)
    return values.astype("float32" if "float" in dtype else dtype)


def _tensor(values: np.ndarray, dtype: str) -> paddle.Tensor:
    return paddle.to_tensor(values).astype(dtype)


def _values(x: paddle.Tensor) -> np.ndarray:
    return (x.astype("float32") if x.dtype in (paddle.bfloat16, paddle.float16) else x).numpy()


def _group(ranks: tuple[int, ...] | None = None) -> Group:
    return backend.groups([ranks])[ranks] if ranks else backend.world_group()


# Collectives without gradients


def reduce_all(shape: tuple[int, ...], dtype: str, op: str) -> np.ndarray:
    x = _tensor(_draw(backend.world().rank, shape, dtype), dtype)
    result = comm.all_reduce_(x, _group(), op)
    assert result is x
    return _values(x)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """As one rounding from float32 leaves it; Paddle's own cast is the oracle."""
    return _values(paddle.to_tensor(values).astype(dtype)) if dtype in ("bfloat16", "float16") else values


# One round of messages, two rounds, and two rounds that do not divide.
@pytest.mark.parametrize("shape", [(3, 5), (WHOLE_BYTES,), (WHOLE_BYTES + 7,), (), (0, 4)], ids=str)
def test_all_reduce_sums(world: World, shape: tuple[int, ...]):
    for dtype in SUMMED:
        inputs = [_draw(rank, shape, dtype) for rank in range(world.size)]
        total = inputs[0]
        for x in inputs[1:]:
            total = total + x  # the order of the ranks: bit for bit
        for result in world.run(reduce_all, shape=shape, dtype=dtype, op="sum"):
            np.testing.assert_array_equal(result, _rounded(total, dtype), err_msg=dtype)


def test_all_reduce_takes_the_maximum(world: World):
    for dtype in DTYPES:
        inputs = [_draw(rank, (3, 5), dtype) for rank in range(world.size)]
        for result in world.run(reduce_all, shape=(3, 5), dtype=dtype, op="max"):
            np.testing.assert_array_equal(result, np.max(inputs, axis=0), err_msg=dtype)


def reduce_special_values(dtype: str) -> np.ndarray:
    rows = [[np.nan, np.inf, 1.0, 60000.0], [1.0, -np.inf, np.inf, 60000.0]]
    return _values(comm.all_reduce_(_tensor(np.float32(rows[backend.world().rank]), dtype), _group()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_reduce_keeps_infinities_and_nan(world2: World, dtype: str):
    largest = {"float32": 120000.0, "bfloat16": 119808.0, "float16": np.inf}[dtype]
    for result in world2.run(reduce_special_values, dtype=dtype):
        np.testing.assert_array_equal(result, [np.nan, np.nan, np.inf, largest])


def gather_and_scatter(dtype: str, rows: int) -> tuple[np.ndarray, np.ndarray | None]:
    x = _tensor(_draw(backend.world().rank, (rows * backend.world().size, 3), dtype), dtype)
    scattered = None if dtype == "bool" else _values(comm.reduce_scatter(x, _group()))
    return _values(comm.all_gather(x, _group())), scattered


@pytest.mark.parametrize("rows", [2, 0])
def test_all_gather_and_reduce_scatter(world: World, rows: int):
    for dtype in DTYPES:
        inputs = [_draw(rank, (rows * world.size, 3), dtype) for rank in range(world.size)]
        total = sum(inputs[1:], inputs[0])
        for rank, (gathered, scattered) in enumerate(world.run(gather_and_scatter, dtype=dtype, rows=rows)):
            np.testing.assert_array_equal(gathered, np.concatenate(inputs), err_msg=dtype)
            if scattered is not None:
                expected = _rounded(total[rank * rows : (rank + 1) * rows], dtype)
                np.testing.assert_array_equal(scattered, expected, err_msg=dtype)


def _counts(size: int, kind: str) -> np.ndarray:
    """counts[i, j]: rows from rank i to rank j."""
    rng = np.random.default_rng(5)
    return {
        "uneven": rng.integers(0, 5, (size, size)),
        "nothing to rank 0": rng.integers(1, 4, (size, size)) * (np.arange(size) > 0),
        "nothing from rank 1": rng.integers(1, 4, (size, size)) * (np.arange(size) != 1)[:, None],
        "nothing": np.zeros((size, size), int),
        "large": np.full((size, size), 9000),
    }[kind]


def exchange(counts: np.ndarray, dtype: str) -> np.ndarray:
    rank = backend.world().rank
    x = _tensor(_draw(rank, (int(counts[rank].sum()), 3, 2), dtype), dtype)
    return _values(comm.all_to_all(x, counts[rank].tolist(), counts[:, rank].tolist(), _group()))


@pytest.mark.parametrize("kind", ["uneven", "nothing to rank 0", "nothing from rank 1", "nothing", "large"])
def test_all_to_all(world: World, kind: str):
    counts = _counts(world.size, kind)
    for dtype in DTYPES if kind == "uneven" else ["float32"]:
        inputs = [_draw(rank, (int(counts[rank].sum()), 3, 2), dtype) for rank in range(world.size)]
        pieces = [np.split(x, np.cumsum(row)[:-1]) for x, row in zip(inputs, counts)]
        for rank, result in enumerate(world.run(exchange, counts=counts, dtype=dtype)):
            np.testing.assert_array_equal(result, np.concatenate([row[rank] for row in pieces]), err_msg=dtype)


def move_float8() -> list[list[float]]:
    """Float8 is only moved, never summed."""
    rank, size = backend.world().rank, backend.world().size
    x = paddle.to_tensor([[float(rank)], [1.5]]).astype(FLOAT8)
    ones = [1, 1] if size == 2 else [2, 0, 0, 0]
    received = [1, 1] if size == 2 else ([2] * 4 if rank == 0 else [0] * 4)
    moved = [comm.all_gather(x, _group()), comm.all_to_all(x, ones, received, _group())]
    return [y.astype("float32").flatten().tolist() for y in moved]


def test_float8_is_moved(world: World):
    results = world.run(move_float8)
    everything = [value for rank in range(world.size) for value in (float(rank), 1.5)]
    assert all(gathered == everything for gathered, _ in results)
    exchanged = [result[1] for result in results]
    assert exchanged == ([[0.0, 1.0], [1.5, 1.5]] if world.size == 2 else [everything, [], [], []])


def broadcast(source: int, dtype: str) -> np.ndarray:
    x = _tensor(_draw(backend.world().rank, (70000,), dtype), dtype)
    return _values(comm.broadcast_(x, source, _group()))


def test_broadcast(world: World):
    for source, dtype in ((0, "float32"), (world.size - 1, "bfloat16")):
        for result in world.run(broadcast, source=source, dtype=dtype):
            np.testing.assert_array_equal(result, _draw(source, (70000,), dtype))


def send_around(num: int) -> tuple[list[np.ndarray], list[float]]:
    """Every rank sends to its successor before it receives, more than the system buffers; then it spoils its input."""
    rank, size = backend.world().rank, backend.world().size
    received = []
    for step in range(2):
        x = _tensor(_draw(rank, (num,), "float32", seed=step), "float32")
        comm.send(x, (rank + 1) % size)
        x.zero_()
    comm.send(paddle.to_tensor([1.5, rank]).astype("bfloat16"), (rank + 1) % size)
    for _ in range(2):
        received.append(comm.recv([num], "float32", (rank - 1) % size).numpy())
    return received, comm.recv([2], "bfloat16", (rank - 1) % size).astype("float32").tolist()


def test_sends_cross_and_keep_their_order(world: World):
    for rank, (received, last) in enumerate(world.run(send_around, num=1 << 20)):
        before = (rank - 1) % world.size
        for step, x in enumerate(received):
            np.testing.assert_array_equal(x, _draw(before, (1 << 20,), "float32", seed=step))
        assert last == [1.5, before]


def asynchronous() -> list[np.ndarray]:
    rank, size = backend.world().rank, backend.world().size
    a, b, c = (_tensor(_draw(rank, (size * 2, 3), "float32", seed), "float32") for seed in range(3))
    works = [
        comm.start_all_reduce(a, _group()),
        comm.start_reduce_scatter(b, _group()),
        comm.start_all_to_all(c, [2] * size, [2] * size, _group()),
    ]
    return [work.wait().numpy() for work in works]


def test_started_collectives_give_their_result_when_waited_for(world: World):
    size = world.size
    inputs = [[_draw(rank, (size * 2, 3), "float32", seed) for rank in range(size)] for seed in range(3)]
    sums = [sum(xs[1:], xs[0]) for xs in inputs[:2]]
    for rank, (a, b, c) in enumerate(world.run(asynchronous)):
        own = slice(rank * 2, rank * 2 + 2)
        np.testing.assert_array_equal(a, sums[0])
        np.testing.assert_array_equal(b, sums[1][own])
        np.testing.assert_array_equal(c, np.concatenate([x[own] for x in inputs[2]]))


def host_values() -> tuple:
    rank, size = backend.world().rank, backend.world().size
    total = comm.sum_floats(np.array([[0.1 * (rank + 1), 1e-17]]), _group())
    counts = comm.exchange_counts(np.arange(size * 2).reshape(size, 2) + 100 * rank, _group())
    said = comm.gather_objects({"rank": rank, "text": "é" * rank, "nan": float("nan")}, _group())
    rows = comm.gather_arrays(np.full((2 * rank, 3), rank, np.int32), _group())
    none = comm.gather_arrays(np.zeros((0, 3)), _group())
    return total, counts, said, [array.tolist() for array in rows], [array.shape for array in none]


def test_host_values(world: World):
    size = world.size
    expected = 0.0
    for rank in range(size):
        expected += 0.1 * (rank + 1)
    for rank, (total, counts, said, rows, none) in enumerate(world.run(host_values)):
        assert rows == [[[other] * 3] * (2 * other) for other in range(size)] and none == [(0, 3)] * size
        assert total.tolist() == [[expected, size * 1e-17]]
        np.testing.assert_array_equal(counts, [[2 * rank + 100 * i, 2 * rank + 1 + 100 * i] for i in range(size)])
        assert [(one["rank"], one["text"]) for one in said] == [(i, "é" * i) for i in range(size)]
        assert all(np.isnan(one["nan"]) for one in said)


def two_meshes() -> dict[str, list[float]]:
    first = build_mesh(ParallelDims(pipeline=2, tensor=2))
    second = build_mesh(ParallelDims(data=4, expert=2, sharding=2))
    sums = {}
    for _ in range(3):
        for mesh, name in product_of_groups(first, second):
            group = getattr(mesh, name)
            x = paddle.to_tensor([float(mesh.rank)])
            sums[f"{mesh.degrees.pipeline} {name}"] = comm.all_reduce_(x, group).tolist() + list(group.ranks)
    assert (
        first.tensor_group is build_mesh(ParallelDims(data=2, tensor=2)).tensor_group
    )  # one group for one list of ranks
    return sums


def product_of_groups(*meshes):
    return [(mesh, name) for mesh in meshes for name in vars(mesh) if name.endswith("_group")]


def test_groups_of_two_meshes_in_one_world(world4: World):
    for rank, sums in enumerate(world4.run(two_meshes)):
        assert all(total == sum(ranks) and rank in ranks for total, *ranks in sums.values())
        assert sums["2 tensor_group"][1:] == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
        assert sums["2 pipe_group"][1:] == [rank % 2, rank % 2 + 2]
        assert sums["1 expert_group"][1:] == [[0, 1], [0, 1], [2, 3], [2, 3]][rank]
        assert sums["1 expert_data_group"][1:] == [rank % 2, rank % 2 + 2]


def count_traffic() -> dict[str, int]:
    rank, size = backend.world().rank, backend.world().size
    comm.traffic.take()
    group, x = _group(), paddle.ones([size * 30, 5])
    comm.all_reduce_(x, group)
    comm.all_reduce_(x.astype("bfloat16"), group)
    comm.all_gather(x, group)
    comm.reduce_scatter(x, group)
    comm.all_to_all(x, [30] * size, [30] * size, group)
    comm.broadcast_(x, 0, group)
    comm.send(x, (rank + 1) % size)
    comm.recv(x.shape, x.dtype, (rank - 1) % size)
    comm.all_reduce_(x, Group((rank,), 0))  # costs nothing
    comm.sum_floats(np.zeros(6), group)
    comm.exchange_counts(np.zeros((size, 3)), group)
    taken = comm.traffic.take()
    assert comm.traffic.take() == {}
    return taken


def test_traffic_follows_the_formulas(world: World):
    n = world.size
    b = n * 30 * 5 * 4
    for rank, sent in enumerate(world.run(count_traffic)):
        assert sent == {
            "all_reduce": 2 * (n - 1) * (b + b // 2) // n,
            "all_gather": (n - 1) * b,
            "reduce_scatter": (n - 1) * b // n,
            "all_to_all": (n - 1) * b // n,
            "broadcast": b * (rank == 0),
            "send": b,
            "host": (n - 1) * 6 * 8 + (n - 1) * 3 * 8,
        }


def record_waits() -> list[str | None]:
    heard: list[str | None] = []
    backend.init(on_wait=heard.append)
    try:
        comm.all_reduce_(paddle.ones([2]), _group())
        comm.send(paddle.ones([2]), 1 - backend.world().rank)
        comm.recv([2], "float32", 1 - backend.world().rank)
    finally:
        backend.init()
    return heard


def test_waits_are_reported(world2: World):
    for rank, heard in enumerate(world2.run(record_waits)):
        assert heard == ["all_reduce of 8 bytes with ranks 0, 1", None, f"recv of 8 bytes with ranks {1 - rank}", None]


# Gradients


def gradient(name: str, rows: int, same_y: bool) -> tuple[np.ndarray, ...]:
    rank, size = backend.world().rank, backend.world().size
    x = _tensor(_draw(rank, (rows, 3), "float32"), "float32")
    x.stop_gradient = False
    function: Callable = getattr(comm, name)
    if name.endswith("exchange_rows"):
        counts = _counts(size, "uneven")
        x = x[: int(counts[rank].sum())].detach()
        x.stop_gradient = False
        out = function(x, counts[rank].tolist(), counts[:, rank].tolist(), _group())
        out = out() if name.startswith("start_") else out
    else:
        out = function(x, _group())
    y = _tensor(_draw(0 if same_y else rank, tuple(out.shape), "float32", seed=1), "float32")
    paddle.autograd.backward([out], [y])
    assert x.grad is not None and not out.stop_gradient
    return x.numpy(), out.numpy(), y.numpy(), x.grad.numpy()


# What a linear map f over all ranks must obey: <f(x), y> = <x, f*(y)>. A value that is the same on all ranks counts
# once: the input of copy_to (its gradient too), the output of reduce_from and gather_rows_replicated (and y with it).
@pytest.mark.parametrize(
    ("name", "same_x", "same_y"),
    [
        ("copy_to", True, False),
        ("reduce_from", False, True),
        ("gather_rows", False, False),
        ("gather_rows_replicated", False, True),
        ("scatter_rows", False, False),
        ("exchange_rows", False, False),
        ("start_exchange_rows", False, False),
    ],
)
def test_gradients_are_adjoint(world: World, name: str, same_x: bool, same_y: bool):
    results = world.run(gradient, name=name, rows=5 * world.size, same_y=same_y)

    def product(left: int, right: int, once: bool) -> float:
        each = [float((r[left].astype(np.float64) * r[right]).sum()) for r in results]
        return each[0] if once else sum(each)

    if same_x:
        forward = sum(float((results[0][0].astype(np.float64) * y).sum()) for _, _, y, _ in results)
    else:
        forward = product(1, 2, once=same_y)
    # float32 rounds sums of up to 4 gradients: 6e-8 a value
    assert product(0, 3, once=same_x) == pytest.approx(forward, rel=1e-6)
    assert abs(forward) > 1


def two_layers(sequence: bool, weights: list[np.ndarray], x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    """y = relu(x A) B with A cut by columns and B by rows; with `sequence` each rank has its rows of x and y."""
    group = _group()
    size, index = group.size, group.index

    def own(array: np.ndarray, axis: int) -> paddle.Tensor:
        tensor = paddle.to_tensor(np.split(array, size, axis=axis)[index].copy())
        tensor.stop_gradient = False
        return tensor

    a, b = own(weights[0], 1), own(weights[1], 0)
    own_x = own(x, 0) if sequence else paddle.to_tensor(x, stop_gradient=False)
    own_dy = own(dy, 0) if sequence else paddle.to_tensor(dy)
    whole = (comm.gather_rows if sequence else comm.copy_to)(own_x, group)
    partial = paddle.nn.functional.relu(whole @ a) @ b
    y = (comm.scatter_rows if sequence else comm.reduce_from)(partial, group)
    paddle.autograd.backward([y], [own_dy.detach()])
    return [tensor.numpy() for tensor in (y, own_x.grad, a.grad, b.grad)]


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_layers_have_the_gradients_of_one_process(world: World, sequence: bool):
    rng = np.random.default_rng(0)
    a, b, x, dy = (rng.standard_normal(shape).astype("float32") for shape in ((6, 8), (8, 6), (4, 6), (4, 6)))
    hidden = np.maximum(x @ a, 0)
    d_hidden = (dy @ b.T) * (hidden > 0)
    y, dx, da, db = hidden @ b, d_hidden @ a.T, x.T @ d_hidden, hidden.T @ dy
    results = world.run(two_layers, sequence=sequence, weights=[a, b], x=x, dy=dy)
    for rank, (got_y, got_dx, got_da, got_db) in enumerate(results):
        own = slice(rank * 4 // world.size, (rank + 1) * 4 // world.size) if sequence else slice(None)
        for got, want in (
            (got_y, y[own]),
            (got_dx, dx[own]),
            (got_da, np.split(da, world.size, axis=1)[rank]),
            (got_db, np.split(db, world.size)[rank]),
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # sums of 8 products in another order


def gradient_that_is_kept() -> tuple[list[float], list[float]]:
    x = paddle.ones([2])
    x.stop_gradient = False
    y = comm.copy_to(x, _group())
    y.retain_grads()
    (y * float(backend.world().rank + 1)).sum().backward()
    return x.grad.tolist(), y.grad.tolist()


def test_copy_to_does_not_change_the_incoming_gradient(world2: World):
    assert world2.run(gradient_that_is_kept) == [([3.0, 3.0], [1.0, 1.0]), ([3.0, 3.0], [2.0, 2.0])]
