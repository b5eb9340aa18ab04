"""What ranks say to one another; nothing else in the package calls a collective.

A group is a list of ranks; a group of one rank costs nothing: every function is then the identity. On a CPU the ranks
talk over `links` (TCP); on GPUs over NCCL through `paddle.distributed`, which has never been run here.

Traffic is counted by formula in bytes of the tensor's own dtype, n ranks, x of B bytes on this rank before the call:
all_reduce 2 (n-1)/n B, reduce_scatter (n-1)/n B, all_gather (n-1) B, broadcast B at the source; all_to_all the rows for
other ranks, send B. That is what ring and pairwise algorithms send, the least possible.
"""

import atexit
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from erniekit.parallel import tcp_collectives, tcp_transport
from erniekit.parallel.process_group import Group, Ranks, World
from erniekit.parallel.tcp_transport import Links
from erniekit.parallel.traffic import Traffic
from erniekit.utils import runtime


@dataclass
class Work:
    """A communication under way. `wait` returns its result; not before may anyone read it or change its input."""

    result: paddle.Tensor
    task: Any = None
    source: paddle.Tensor | None = None  # what is being sent stays alive

    def wait(self) -> paddle.Tensor:
        if self.task is not None:
            self.task.wait()
            self.task = self.source = None
        return self.result


traffic = Traffic()
# Told what this rank waits for, in words, and None when the wait is over (a heartbeat's hook).
on_wait: Callable[[str | None], None] | None = None

_world = World(0, 1, ("localhost:0",))
_links: Links | None = None
_groups: dict[tuple[str, Ranks], Group] = {}
_channels: dict[tuple[int, int], Any] = {}  # NCCL only: (from, to) -> group


def init(timeout_seconds: float = 600) -> World:
    """Join the processes that a launcher started (PADDLE_TRAINER_ID, PADDLE_TRAINERS_NUM, PADDLE_TRAINER_ENDPOINTS).
    Without a launcher this process is the whole world. Calling it again does nothing.

    Args:
        timeout_seconds: how long to wait for all ranks to come.

    Raises:
        TrainError: ranks did not come in time (the message names them), or a port is taken.
        ConfigError: several hosts have no job token.
    """
    global _world, _links
    env = dist.ParallelEnv()
    if env.world_size < 2 or _world.size > 1:
        return _world
    world = World(env.rank, env.world_size, tuple(env.trainer_endpoints))
    token = runtime.job_token_of([endpoint.rpartition(":")[0] for endpoint in world.endpoints])
    if paddle.get_device().startswith("gpu"):
        tcp_transport.roll_call(world, token, timeout_seconds)
        dist.init_parallel_env()
    else:
        _links = tcp_transport.connect(world, token, timeout_seconds)
        atexit.register(_links.close)
    _world = world
    return _world


def world() -> World:
    """Who this process is."""
    return _world


def groups(rank_lists: Sequence[Ranks], role: str = "") -> dict[Ranks, Group]:
    """Create the groups that do not exist yet; returns those that this rank is in. All ranks call it with the same
    lists in the same order (NCCL needs that).

    Groups of the same ranks but another `role` have communicators of their own over NCCL: what one of them carries
    neither waits for the other nor needs to be started in an order with it.
    """
    for ranks in rank_lists:
        if (role, ranks) not in _groups:
            handle = dist.new_group(list(ranks)) if _links is None and len(ranks) > 1 else None
            _groups[role, ranks] = Group(ranks, ranks.index(_world.rank) if _world.rank in ranks else -1, handle)
    return {ranks: _groups[role, ranks] for ranks in rank_lists if _world.rank in ranks}


def world_group() -> Group:
    """All ranks."""
    ranks = tuple(range(_world.size))
    return groups([ranks])[ranks]


def channels(pairs: Sequence[tuple[int, int]]) -> None:
    """Prepare `send` and `recv` along these (from, to) pairs; all ranks call it with the same pairs. NCCL gets a
    communicator for each direction, else a send that crosses another would wait for ever; TCP needs nothing.
    """
    for pair in pairs:
        if _links is None and pair not in _channels:
            _channels[pair] = dist.new_group(sorted(pair))


@contextmanager
def _waiting(kind: str, x: paddle.Tensor, ranks: Ranks) -> Iterator[None]:
    """Tell the heartbeat what is waited for. Not that it is over if it fails: then a peer is to blame."""
    if on_wait is None:
        yield
        return
    on_wait(f"{kind} of {_num_bytes(x)} bytes with ranks {', '.join(map(str, ranks))}")
    yield
    on_wait(None)


def _on_host(x: paddle.Tensor, group: Group) -> np.ndarray:
    """The values of a communication's result. Over NCCL it is here, not at its start, that the host waits."""
    with _waiting("host values", x, group.ranks):
        return x.numpy()


def _num_bytes(x: paddle.Tensor) -> int:
    return math.prod(x.shape) * x.element_size()


def _bytes(x: paddle.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert x.is_contiguous()
    size = _num_bytes(x)
    return tcp_transport.view(x.data_ptr(), size, x) if size else memoryview(bytearray())


def _dtype(x: paddle.Tensor) -> str:
    return str(x.dtype).removeprefix("paddle.")


def _tcp() -> Links:
    assert _links is not None, "comm.init() comes first"
    return _links


# Not differentiable.


def all_reduce_(x: paddle.Tensor, group: Group, op: str = "sum") -> paddle.Tensor:
    """x (contiguous, any shape) becomes the sum or the maximum over the group, the same bits on every rank. Over TCP
    16-bit floats are summed in float32 and rounded once.
    """
    return start_all_reduce(x, group, op).wait()


def start_all_reduce(x: paddle.Tensor, group: Group, op: str = "sum") -> Work:
    """`all_reduce_` that runs beside what follows where the backend allows (NCCL); over TCP it runs at once."""
    assert op in ("sum", "max")
    if group.size == 1 or not _num_bytes(x):
        return Work(x)
    traffic.add("all_reduce", 2 * (group.size - 1) / group.size * _num_bytes(x))
    with _waiting("all_reduce", x, group.ranks), paddle.no_grad():
        if group.handle is not None:
            kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
            return Work(x, dist.all_reduce(x, kind, group=group.handle, sync_op=False))
        tcp_collectives.all_reduce(_tcp(), group, _bytes(x), _dtype(x), op)
        return Work(x)


def all_gather(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] on each rank, the same shape everywhere -> [size * n, ...] in the group's order."""
    return x if group.size == 1 else _gather(x, group, "all_gather")


def _gather(x: paddle.Tensor, group: Group, kind: str) -> paddle.Tensor:
    traffic.add(kind, (group.size - 1) * _num_bytes(x))
    x = x.detach().contiguous()
    with _waiting(kind, x, group.ranks), paddle.no_grad():
        out = paddle.empty([group.size * x.shape[0], *x.shape[1:]], dtype=x.dtype)
        if group.handle is not None:
            dist.stream.all_gather(out, x, group=group.handle, sync_op=True)
        else:
            tcp_collectives.gather(_tcp(), kind, group, _bytes(x), _bytes(out))
        return out


def reduce_scatter(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[size * n, ...] -> this rank's [n, ...] of the sum. Over TCP 16-bit floats are summed in float32."""
    return start_reduce_scatter(x, group).wait()


def start_reduce_scatter(x: paddle.Tensor, group: Group) -> Work:
    """`reduce_scatter` that runs beside what follows where the backend allows (NCCL); over TCP it runs at once."""
    if group.size == 1:
        return Work(x)
    assert x.shape[0] % group.size == 0, f"{x.shape[0]} rows do not divide by {group.size} ranks"
    traffic.add("reduce_scatter", (group.size - 1) / group.size * _num_bytes(x))
    x = x.detach().contiguous()
    out = paddle.empty([x.shape[0] // group.size, *x.shape[1:]], dtype=x.dtype)
    with _waiting("reduce_scatter", x, group.ranks), paddle.no_grad():
        if group.handle is not None:
            task = dist.stream.reduce_scatter(out, x, dist.ReduceOp.SUM, group=group.handle, sync_op=False)
            return Work(out, task, x)
        tcp_collectives.reduce_scatter(_tcp(), group, _bytes(x), _bytes(out), _dtype(x))
        return Work(out)


def all_to_all(x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group) -> paddle.Tensor:
    """Rows to and from every rank: x [sum(send_counts), ...], grouped by receiver -> [sum(recv_counts), ...], grouped
    by sender. Counts may be 0 and unequal; each rank's recv_counts[i] is rank i's send_counts for it.
    """
    return start_all_to_all(x, send_counts, recv_counts, group).wait()


def start_all_to_all(x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group) -> Work:
    """`all_to_all` that runs beside what follows where the backend allows (NCCL); over TCP it runs at once."""
    return Work(x) if group.size == 1 else _start_exchange(x, send_counts, recv_counts, group, "all_to_all")


def _start_exchange(
    x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group, kind: str
) -> Work:
    sent, received = [int(n) for n in send_counts], [int(n) for n in recv_counts]
    assert sum(sent) == x.shape[0] and len(sent) == len(received) == group.size
    x = x.detach().contiguous()
    out = paddle.empty([sum(received), *x.shape[1:]], dtype=x.dtype)
    row_bytes = x.element_size() * math.prod(x.shape[1:])
    traffic.add(kind, (x.shape[0] - sent[group.index]) * row_bytes)
    with _waiting(kind, x, group.ranks):
        if group.handle is not None:
            sizes = {"in_split_sizes": sent, "out_split_sizes": received}
            task = dist.alltoall_single(out_tensor=out, in_tensor=x, **sizes, group=group.handle, sync_op=False)
            return Work(out, task, x)
        outgoing, incoming = (
            tcp_collectives.cut(_bytes(x), sent, row_bytes),
            tcp_collectives.cut(_bytes(out), received, row_bytes),
        )
        incoming[group.index][:] = outgoing[group.index]
        tcp_collectives.exchange(_tcp(), kind, group, outgoing, incoming)
        return Work(out)


def broadcast_(x: paddle.Tensor, source_index: int, group: Group) -> paddle.Tensor:
    """x (contiguous) becomes what it is on the rank at `source_index` of the group."""
    if group.size == 1 or not _num_bytes(x):
        return x
    is_source = group.index == source_index
    traffic.add("broadcast", _num_bytes(x) if is_source else 0)
    with _waiting("broadcast", x, group.ranks), paddle.no_grad():
        if group.handle is not None:
            dist.broadcast(x, group.ranks[source_index], group=group.handle)
            return x
        data = _bytes(x)
        outgoing = [(group.ranks[i], data) for i in group.others()] if is_source else []
        _tcp().exchange("broadcast", outgoing, [] if is_source else [(group.ranks[source_index], data)])
        return x


def send(x: paddle.Tensor, peer_rank: int) -> None:
    """Send to a rank of the world, without waiting for it to receive; x may be changed afterwards (over NCCL: not
    before the receiver has it). Between two ranks messages keep their order.
    """
    x = x.detach().contiguous()
    traffic.add("send", _num_bytes(x))
    if _links is None:
        dist.isend(x, peer_rank, group=_channels[_world.rank, peer_rank])
    else:
        _links.post(peer_rank, "send", _bytes(x))


def recv(shape: Sequence[int], dtype: Any, peer_rank: int) -> paddle.Tensor:
    """Wait for the next tensor that a rank of the world sends; both sides know shape and dtype."""
    x = paddle.empty(list(shape), dtype=dtype)
    with _waiting("recv", x, (peer_rank,)):
        if _links is None:
            dist.recv(x, peer_rank, group=_channels[peer_rank, _world.rank])
        else:
            _links.receive(peer_rank, "send", _bytes(x))
    return x


# Host values. Their traffic is counted as "host", apart from what a model's tensors cost.


def sum_floats(values: np.ndarray, group: Group) -> np.ndarray:
    """Sum of float64 arrays of one shape over the group, in the group's order: the same bits on every rank."""
    if group.size == 1:
        return values
    rows = _on_host(_gather(paddle.to_tensor(values.astype(np.float64)).reshape([1, -1]), group, "host"), group)
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total.reshape(values.shape)


def exchange_counts(counts: np.ndarray, group: Group) -> np.ndarray:
    """[size, n] int64: row i goes to rank i of the group -> [size, n]: row i came from rank i."""
    if group.size == 1:
        return counts
    ones = [1] * group.size
    work = _start_exchange(paddle.to_tensor(counts.astype(np.int64)), ones, ones, group, "host")
    return _on_host(work.wait(), group)


def gather_objects(value: Any, group: Group) -> list[Any]:
    """What every rank of the group has to say, in its order; values that JSON knows."""
    if group.size == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    lengths = _on_host(_gather(paddle.to_tensor(np.array([len(data)])), group, "host"), group)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = _on_host(_gather(paddle.to_tensor(padded).reshape([1, -1]), group, "host"), group)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def barrier(group: Group) -> None:
    """Wait until every rank of the group is here."""
    sum_floats(np.zeros(1), group)


# Differentiable: each is a linear map over the group's ranks, and its backward pass is the transposed map.


def copy_to(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """The identity, entering a part where each rank computes with its share of the weights; the gradients add up."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """Sum over the group, leaving such a part; the gradient, equal on all ranks, passes as it is."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_rows(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] -> [size * n, ...] for use in a part where each rank has its share of the weights: gradients of the
    whole are summed over the ranks, each gets its rows.
    """
    return x if group.size == 1 else _GatherRows.apply(x, group)


def gather_rows_replicated(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] -> [size * n, ...] for use that is the same on all ranks: each takes its rows of the gradient."""
    return x if group.size == 1 else _GatherRowsReplicated.apply(x, group)


def scatter_rows(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[size * n, ...], a partial sum on each rank -> this rank's [n, ...] of the sum; gradients are gathered."""
    return x if group.size == 1 else _ScatterRows.apply(x, group)


def exchange_rows(
    x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group
) -> paddle.Tensor:
    """`all_to_all` whose gradient goes back the same ways. [sum(send_counts), ...] -> [sum(recv_counts), ...]."""
    return x if group.size == 1 else _ExchangeRows.apply(x, send_counts, recv_counts, group)


def start_exchange_rows(
    x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group
) -> Callable[[], paddle.Tensor]:
    """`exchange_rows` whose rows travel, where the backend allows, beside what is computed until the function that it
    returns is called for them. So do their gradients, from where they are asked back.
    """
    if group.size == 1:
        return lambda: x
    journey = _Journey((send_counts, recv_counts), group)
    ticket = _Depart.apply(x, journey)
    return lambda: _Arrive.apply(ticket, journey)


class _CopyTo(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        return x.clone()  # Paddle takes a shared buffer for an in-place operation, which a leaf refuses

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        return all_reduce_(dy.clone(), ctx.group)


class _ReduceFrom(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        return all_reduce_(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        return dy.detach()


class _GatherRows(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        return reduce_scatter(dy, ctx.group)


class _GatherRowsReplicated(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        num_rows = dy.shape[0] // ctx.group.size
        return dy[ctx.group.index * num_rows : (ctx.group.index + 1) * num_rows].clone()


class _ScatterRows(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        return all_gather(dy, ctx.group)


class _ExchangeRows(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group
    ) -> paddle.Tensor:
        ctx.counts, ctx.group = (send_counts, recv_counts), group
        return all_to_all(x, send_counts, recv_counts, group)

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        sent, received = ctx.counts
        return all_to_all(dy, received, sent, ctx.group)


@dataclass
class _Journey:
    """Rows under way, and later their gradients."""

    counts: tuple[Sequence[int], Sequence[int]]
    group: Group
    work: Work | None = None

    def wait(self) -> paddle.Tensor:
        assert self.work is not None
        work, self.work = self.work, None
        return work.wait()


class _Depart(PyLayer):
    """Gives a ticket [1], whose only use is that the backward pass comes here after `_Arrive`."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, journey: _Journey) -> paddle.Tensor:
        ctx.journey = journey
        journey.work = start_all_to_all(x, *journey.counts, journey.group)
        return paddle.zeros([1], dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dticket: paddle.Tensor) -> paddle.Tensor:
        return ctx.journey.wait()


class _Arrive(PyLayer):
    @staticmethod
    def forward(ctx: Any, ticket: paddle.Tensor, journey: _Journey) -> paddle.Tensor:
        ctx.journey = journey
        return journey.wait()

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        sent, received = ctx.journey.counts
        ctx.journey.work = start_all_to_all(dy, received, sent, ctx.journey.group)
        return paddle.zeros([1], dtype=dy.dtype)
