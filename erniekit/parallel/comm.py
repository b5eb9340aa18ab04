"""Collective communication. The only module that calls collectives; those that a model's graph contains come with their
adjoints (transposed maps).

A group is a list of ranks; in a group of one rank every function is the identity. What carries the bytes (TCP on CPUs,
NCCL on GPUs) is chosen in parallel/backend.py. Every function counts what it sends by the formulas of
parallel/traffic_counter.py.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from erniekit.parallel import backend, tcp_collectives, tcp_transport
from erniekit.parallel.process_group import Group
from erniekit.parallel.traffic_counter import Traffic, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes

traffic = Traffic()


@dataclass
class Work:
    """A communication under way. Its result may not be read, nor its input changed, before `wait` has returned it."""

    result: paddle.Tensor
    task: Any = None
    source: paddle.Tensor | None = None  # keeps the tensor that is being sent alive

    def wait(self) -> paddle.Tensor:
        if self.task is not None:
            self.task.wait()
            self.task = self.source = None
        return self.result


def _on_host(x: paddle.Tensor, group: Group) -> np.ndarray:
    """The values of a communication's result. Over NCCL the host waits here, not at the start."""
    with backend.waiting("host values", _num_bytes(x), group.ranks):
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


# Not differentiable.


def all_reduce_(x: paddle.Tensor, group: Group, op: str = "sum") -> paddle.Tensor:
    """x (contiguous, any shape) becomes the sum or the maximum over the group, the same bits on every rank. Over TCP
    16-bit floats are summed in float32 and rounded once.
    """
    return start_all_reduce(x, group, op).wait()


def start_all_reduce(x: paddle.Tensor, group: Group, op: str = "sum") -> Work:
    """`all_reduce_` that runs in the background where the backend allows it (NCCL); over TCP it runs at once."""
    assert op in ("sum", "max")
    if group.size == 1 or not _num_bytes(x):
        return Work(x)
    traffic.add("all_reduce", all_reduce_bytes(_num_bytes(x), group.size))
    with backend.waiting("all_reduce", _num_bytes(x), group.ranks), paddle.no_grad():
        if group.handle is not None:
            kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
            return Work(x, dist.all_reduce(x, kind, group=group.handle, sync_op=False))
        tcp_collectives.all_reduce(backend.tcp_links(), group, _bytes(x), _dtype(x), op)
        return Work(x)


def all_gather(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] on each rank, the same shape everywhere -> [size * n, ...] in the group's order."""
    return x if group.size == 1 else _gather(x, group, "all_gather")


def _gather(x: paddle.Tensor, group: Group, kind: str) -> paddle.Tensor:
    traffic.add(kind, all_gather_bytes(_num_bytes(x), group.size))
    x = x.detach().contiguous()
    with backend.waiting(kind, _num_bytes(x), group.ranks), paddle.no_grad():
        out = paddle.empty([group.size * x.shape[0], *x.shape[1:]], dtype=x.dtype)
        if group.handle is not None:
            dist.stream.all_gather(out, x, group=group.handle, sync_op=True)
        else:
            tcp_collectives.gather(backend.tcp_links(), kind, group, _bytes(x), _bytes(out))
        return out


def reduce_scatter(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[size * n, ...] -> this rank's [n, ...] of the sum. Over TCP 16-bit floats are summed in float32."""
    return start_reduce_scatter(x, group).wait()


def start_reduce_scatter(x: paddle.Tensor, group: Group) -> Work:
    """`reduce_scatter` that runs in the background where the backend allows it (NCCL); over TCP it runs at once."""
    if group.size == 1:
        return Work(x)
    assert x.shape[0] % group.size == 0, f"{x.shape[0]} rows do not divide by {group.size} ranks"
    traffic.add("reduce_scatter", reduce_scatter_bytes(_num_bytes(x), group.size))
    x = x.detach().contiguous()
    out = paddle.empty([x.shape[0] // group.size, *x.shape[1:]], dtype=x.dtype)
    with backend.waiting("reduce_scatter", _num_bytes(x), group.ranks), paddle.no_grad():
        if group.handle is not None:
            task = dist.stream.reduce_scatter(out, x, dist.ReduceOp.SUM, group=group.handle, sync_op=False)
            return Work(out, task, x)
        tcp_collectives.reduce_scatter(backend.tcp_links(), group, _bytes(x), _bytes(out), _dtype(x))
        return Work(out)


def all_to_all(x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group) -> paddle.Tensor:
    """Rows to and from every rank: x [sum(send_counts), ...], grouped by receiver -> [sum(recv_counts), ...], grouped
    by sender. Counts may be 0 and unequal; each rank's recv_counts[i] is rank i's send_counts for it.
    """
    return start_all_to_all(x, send_counts, recv_counts, group).wait()


def start_all_to_all(x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group) -> Work:
    """`all_to_all` that runs in the background where the backend allows it (NCCL); over TCP it runs at once."""
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
    with backend.waiting(kind, _num_bytes(x), group.ranks):
        if group.handle is not None:
            sizes = {"in_split_sizes": sent, "out_split_sizes": received}
            task = dist.alltoall_single(out_tensor=out, in_tensor=x, **sizes, group=group.handle, sync_op=False)
            return Work(out, task, x)
        outgoing, incoming = (
            tcp_collectives.split(_bytes(x), sent, row_bytes),
            tcp_collectives.split(_bytes(out), received, row_bytes),
        )
        incoming[group.index][:] = outgoing[group.index]
        tcp_collectives.exchange(backend.tcp_links(), kind, group, outgoing, incoming)
        return Work(out)


def broadcast_(x: paddle.Tensor, source_index: int, group: Group) -> paddle.Tensor:
    """x (contiguous) gets the values that it has on the rank at `source_index` of the group."""
    if group.size == 1 or not _num_bytes(x):
        return x
    is_source = group.index == source_index
    traffic.add("broadcast", _num_bytes(x) if is_source else 0)
    with backend.waiting("broadcast", _num_bytes(x), group.ranks), paddle.no_grad():
        if group.handle is not None:
            dist.broadcast(x, group.ranks[source_index], group=group.handle)
            return x
        data = _bytes(x)
        outgoing = [(group.ranks[i], data) for i in group.others()] if is_source else []
        backend.tcp_links().exchange("broadcast", outgoing, [] if is_source else [(group.ranks[source_index], data)])
        return x


def send(x: paddle.Tensor, peer_rank: int) -> None:
    """Send to a rank of the world, without waiting for it to receive; x may be changed afterwards (over NCCL: not
    before the receiver has it). Between two ranks messages keep their order.
    """
    x = x.detach().contiguous()
    traffic.add("send", _num_bytes(x))
    channel = backend.channel(backend.world().rank, peer_rank)
    if channel is not None:
        dist.isend(x, peer_rank, group=channel)
    else:
        backend.tcp_links().post(peer_rank, "send", _bytes(x))


def recv(shape: Sequence[int], dtype: Any, peer_rank: int) -> paddle.Tensor:
    """Wait for the next tensor that a rank of the world sends; both sides know shape and dtype."""
    x = paddle.empty(list(shape), dtype=dtype)
    with backend.waiting("recv", _num_bytes(x), (peer_rank,)):
        channel = backend.channel(peer_rank, backend.world().rank)
        if channel is not None:
            dist.recv(x, peer_rank, group=channel)
        else:
            backend.tcp_links().receive(peer_rank, "send", _bytes(x))
    return x


def send_to_next(x: paddle.Tensor, group: Group) -> None:
    """Send a tensor to the next rank of the group's ring, without waiting for it to receive; x may be changed
    afterwards. Over TCP only. A tensor without elements is not sent.
    """
    assert group.handle is None, "the ring has been written for TCP"
    if not _num_bytes(x):
        return
    traffic.add("ring", _num_bytes(x))
    backend.tcp_links().post(group.ranks[(group.index + 1) % group.size], "ring", _bytes(x))


def receive_from_previous(shape: Sequence[int], group: Group) -> paddle.Tensor:
    """Wait for the next fp32 tensor that the previous rank of the group's ring sends; both know its shape."""
    x, peer = paddle.empty(list(shape), dtype="float32"), group.ranks[(group.index - 1) % group.size]
    if _num_bytes(x):
        with backend.waiting("ring", _num_bytes(x), (peer,)):
            backend.tcp_links().receive(peer, "ring", _bytes(x))
    return x


# Host values. Their traffic is counted as "host", separately from that of a model's tensors.


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
    """The values of every rank of the group, in its order; they must be of JSON's types."""
    if group.size == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    return [json.loads(row.tobytes()) for row in gather_arrays(data, group)]


def gather_arrays(array: np.ndarray, group: Group) -> list[np.ndarray]:
    """The arrays [n, ...] of every rank of the group, in its order; only n may differ."""
    if group.size == 1:
        return [array]
    lengths = _on_host(_gather(paddle.to_tensor(np.array([len(array)])), group, "host"), group)
    if not lengths.any():
        return [array] * group.size
    padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    rows = _on_host(_gather(paddle.to_tensor(padded).unsqueeze(0), group, "host"), group)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


# Differentiable: each is a linear map over the group's ranks, and its backward pass is the transposed map.


def copy_to(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """Enter a tensor-parallel region (Megatron-LM's f): the identity forward, an all-reduce backward."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """Leave a tensor-parallel region (Megatron-LM's g): an all-reduce forward, the identity backward."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def sum_over(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """The sum over the ranks, of which each computes a part of the loss from it: an all-reduce forward and backward."""
    return copy_to(reduce_from(x, group), group)


def gather_rows(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] -> [size * n, ...], entering a tensor-parallel region with sequence parallelism: an all-gather forward,
    a reduce-scatter backward.
    """
    return x if group.size == 1 else _GatherRows.apply(x, group)


def gather_rows_replicated(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[n, ...] -> [size * n, ...] for a computation that is the same on all ranks: backward, each takes its rows."""
    return x if group.size == 1 else _GatherRowsReplicated.apply(x, group)


def scatter_rows(x: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[size * n, ...], a partial sum on each rank -> this rank's [n, ...] of the sum; gradients are gathered."""
    return x if group.size == 1 else _ScatterRows.apply(x, group)


def exchange_rows(
    x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group
) -> paddle.Tensor:
    """`all_to_all` whose gradient is sent back by the transposed all-to-all. [sum(send_counts), ...] ->
    [sum(recv_counts), ...].
    """
    return x if group.size == 1 else _ExchangeRows.apply(x, send_counts, recv_counts, group)


def start_exchange_rows(
    x: paddle.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group
) -> Callable[[], paddle.Tensor]:
    """`exchange_rows` in the background: where the backend allows it, the rows are sent while the caller computes
    something else before calling the function that is returned. The same holds for their gradients.
    """
    if group.size == 1:
        return lambda: x
    transfer = _Transfer((send_counts, recv_counts), group)
    ticket = _Depart.apply(x, transfer)
    return lambda: _Arrive.apply(ticket, transfer)


class _CopyTo(PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        return x.clone()  # Paddle treats a shared buffer as an in-place operation, which a leaf refuses

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
class _Transfer:
    """An exchange of rows under way, and later that of their gradients."""

    counts: tuple[Sequence[int], Sequence[int]]
    group: Group
    work: Work | None = None

    def wait(self) -> paddle.Tensor:
        assert self.work is not None
        work, self.work = self.work, None
        return work.wait()


class _Depart(PyLayer):
    """Starts the exchange. Its output, a ticket [1], only makes the backward pass come here after `_Arrive`."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, transfer: _Transfer) -> paddle.Tensor:
        ctx.transfer = transfer
        transfer.work = start_all_to_all(x, *transfer.counts, transfer.group)
        return paddle.zeros([1], dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dticket: paddle.Tensor) -> paddle.Tensor:
        return ctx.transfer.wait()


class _Arrive(PyLayer):
    @staticmethod
    def forward(ctx: Any, ticket: paddle.Tensor, transfer: _Transfer) -> paddle.Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx: Any, dy: paddle.Tensor) -> paddle.Tensor:
        sent, received = ctx.transfer.counts
        ctx.transfer.work = start_all_to_all(dy, received, sent, ctx.transfer.group)
        return paddle.zeros([1], dtype=dy.dtype)
