"""Weights that are divided over ranks between uses (ZeRO stage 3, Rajbhandari et al. 2020, arXiv 1910.02054, section 5;
fully sharded data parallelism, Zhao et al. 2023, arXiv 2304.11277).

The parameters of a unit (a block of the model) are whole only while the unit computes. At other times a rank keeps this
rank's chunk [c] of each, the chunk that its optimizer updates (parallel/buckets.py), and the parameter has a shape and
no memory: reading it is an error.

    units.wrap(name, block.forward)      gathers, runs, releases
    backward pass of a unit              gathers; the one before it is released, and its gradients are sent
    units.finish_backward(model_chunk)   after each backward pass: the same for what is left

The graph keeps a parameter's tensor and not its memory, so that what is gathered again is what the backward pass reads.

Ranks must run their exchanges in one order, even if the batch of one does not reach a unit. In a backward pass each
unit therefore has its turn, from the last to the first: a rank that reaches a unit first serves all units behind it,
and `finish_backward` serves those that the rank's loss has not reached.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.parallel import comm
from erniekit.parallel.buckets import DEFAULT_LIMIT, Bucket, Entry, plan_buckets


@dataclass(frozen=True)
class Unit:
    """A block whose parameters are gathered together. `buckets`: what one gathering exchanges; `entries`: all of its
    parameters that are divided.
    """

    name: str
    model_chunk: int
    entries: tuple[Entry, ...]
    buckets: tuple[Bucket, ...]


class DividedTensor:
    """A tensor [shape] of which each rank of a shard group keeps its chunk [c], padded with zeros. It stands for a
    tensor where values are saved and loaded.
    """

    def __init__(self, entry: Entry, whole: paddle.Tensor) -> None:
        """`entry`: the parameter that it has the shape of."""
        self.entry, self.chunk = entry, chunk_of(entry, whole)

    @classmethod
    def taken_from(cls, parameter: paddle.Tensor, entry: Entry) -> "DividedTensor":
        """The values of a parameter, which then has no memory."""
        value = cls(entry, parameter)
        parameter._clear_data()
        return value

    @property
    def shape(self) -> list[int]:
        """That of the whole tensor."""
        return list(self.entry.shape)

    @property
    def dtype(self) -> paddle.dtype:
        """That of the values."""
        return self.chunk.dtype

    def set_value(self, value: paddle.Tensor | np.ndarray) -> None:
        """Keep this rank's chunk of a whole tensor."""
        whole = paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        assert list(whole.shape) == self.shape and whole.dtype == self.dtype, self.entry.name
        self.chunk = chunk_of(self.entry, whole)

    @paddle.no_grad()
    def whole(self) -> paddle.Tensor:
        """All values. Every rank of the shard group has to call it."""
        return joined_chunks(comm.all_gather(self.chunk, self.entry.placement.shard), self.entry.shape)

    def in_fp32(self) -> "DividedTensor":
        """A copy."""
        copy = object.__new__(DividedTensor)
        copy.entry, copy.chunk = self.entry, self.chunk.astype("float32").clone()
        return copy


class ShardedUnits:
    """The divided parameters of this rank.

    `values`: what each holds between uses, by name. `on_gradients(model_chunk, unit)` is called when the gradients of a
    unit's parameters are complete, at the same point of the order on every rank.

    Args:
        tensors: the parameters of the model by name. Those of `entries` lose their memory.
        entries: the parameters that are divided, in the order of the units in a forward pass; `Entry.unit` is the unit.
        limit: elements of a bucket.
        values: of parameters that have lost their memory already.
    """

    def __init__(
        self,
        tensors: Mapping[str, paddle.Tensor],
        entries: Sequence[Entry],
        limit: int = DEFAULT_LIMIT,
        values: Mapping[str, DividedTensor] | None = None,
    ) -> None:
        assert all(entry.unit and entry.placement.shard.size > 1 for entry in entries)
        self.tensors = {entry.name: tensors[entry.name] for entry in entries}
        self.entries = {entry.name: entry for entry in entries}
        self.units = {name: _unit(name, entries, limit) for name in dict.fromkeys(entry.unit for entry in entries)}
        self.on_gradients: Callable[[int, str], None] = lambda model_chunk, unit: None
        self._users: Counter[str] = Counter()  # of each unit: what needs it whole now
        self._reached: dict[int, set[str]] = {}  # units with a backward pass, by chunk of the model
        self._turns: dict[int, deque[str]] = {}  # those that have not had their turn in this backward pass
        self._open: str | None = None  # the unit whose backward pass runs
        self.values = dict(values or {})
        for name, tensor in self.tensors.items():
            if name not in self.values:
                self.values[name] = DividedTensor.taken_from(tensor, self.entries[name])
        assert self.values.keys() == self.entries.keys()

    @property
    def chunks(self) -> dict[str, paddle.Tensor]:
        """This rank's chunk [c] of each parameter."""
        return {name: value.chunk for name, value in self.values.items()}

    # Forward passes

    def wrap(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of a unit, which gathers and releases its parameters. Its result is a nest of tensors and
        host values.
        """

        def run(*args: Any) -> Any:
            with self.gathered(name):
                result = forward(*args)
            return self._marked(name, result) if paddle.is_grad_enabled() else result

        return run

    @contextmanager
    def gathered(self, *names: str) -> Iterator[None]:
        """These units are whole. Every rank of their shard groups has to enter it at the same time."""
        for name in names:
            self._gather(name)
        try:
            yield
        finally:
            for name in names:
                self._release(name)

    @paddle.no_grad()
    def _gather(self, name: str) -> None:
        self._users[name] += 1
        if self._users[name] > 1:
            return
        for bucket in self.units[name].buckets:
            shard = bucket.placement.shard
            chunks = [self.values[entry.name].chunk for entry in bucket.entries]
            sent = chunks[0] if len(chunks) == 1 else paddle.concat(chunks)
            matrix = comm.all_gather(sent, shard).reshape([shard.size, bucket.columns])
            pieces = [matrix] if len(chunks) == 1 else paddle.split(matrix, bucket.sections[:-1], axis=1)
            del sent, matrix
            for entry, rows in zip(bucket.entries, pieces, strict=True):
                _share_memory(joined_chunks(rows, entry.shape), self.tensors[entry.name])

    def _release(self, name: str) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            for entry in self.units[name].entries:
                self.tensors[entry.name]._clear_data()

    # Backward passes

    def _marked(self, name: str, result: Any) -> Any:
        """The result of a unit, whose backward pass begins with the unit's turn."""
        leaves = paddle.utils.flatten(result)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, paddle.Tensor) and not leaf.stop_gradient]
        if not places:
            return result
        self._reached.setdefault(self.units[name].model_chunk, set()).add(name)
        marked = _Turn.apply(lambda: self._begin_turn(name), *(leaves[place] for place in places))
        for place, leaf in zip(places, [marked] if isinstance(marked, paddle.Tensor) else marked, strict=True):
            leaves[place] = leaf
        return paddle.utils.pack_sequence_as(result, leaves)

    def _begin_turn(self, name: str) -> None:
        """The backward pass of a unit begins: gather it, after all that comes before it in the order."""
        turns = self._turns_of(self.units[name].model_chunk)
        assert name in turns, f"{name}: a second backward pass through one forward pass"
        while self._open != name:
            self._close()
            self._open = turns.popleft()
            self._gather(self._open)

    def _turns_of(self, model_chunk: int) -> deque[str]:
        if model_chunk not in self._turns:
            reached = self._reached.get(model_chunk, set())
            self._turns[model_chunk] = deque(name for name in reversed(self.units) if name in reached)
        return self._turns[model_chunk]

    def _close(self) -> None:
        """Release the unit whose backward pass is done, and send its gradients."""
        if self._open is not None:
            name, self._open = self._open, None
            self._release(name)
            self.on_gradients(self.units[name].model_chunk, name)

    def finish_backward(self, model_chunk: int) -> None:
        """After each backward pass through a chunk of the model: give the units that are left their turn."""
        turns = self._turns_of(model_chunk)
        while turns:
            self._close()
            self._open = turns.popleft()
            self._gather(self._open)
        self._close()
        del self._turns[model_chunk]


class _Turn(PyLayer):
    """The identity, whose backward pass waits for the gradients of all results and then calls `begin`."""

    @staticmethod
    def forward(ctx: Any, begin: Callable[[], None], *results: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        ctx.begin = begin
        return tuple(result.clone() for result in results)  # Paddle takes a shared buffer for an in-place operation

    @staticmethod
    def backward(ctx: Any, *gradients: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        ctx.begin()
        return tuple(gradient.detach() for gradient in gradients)


def _unit(name: str, entries: Sequence[Entry], limit: int) -> Unit:
    own = tuple(entry for entry in entries if entry.unit == name)
    return Unit(name, own[0].model_chunk, own, tuple(plan_buckets(own, limit)))


def _share_memory(source: paddle.Tensor, target: paddle.Tensor) -> None:
    """Let a parameter without memory have that of a tensor of its shape."""
    assert source.is_contiguous() and source.dtype == target.dtype and source.shape == target.shape
    target.get_tensor()._share_data_with(source.get_tensor())


@paddle.no_grad()
def chunk_of(entry: Entry, whole: paddle.Tensor) -> paddle.Tensor:
    """This rank's chunk [c] of a tensor of a parameter's shape, a copy padded with zeros."""
    shard = entry.placement.shard
    begin = min(shard.index * entry.chunk, entry.size)
    end = min(begin + entry.chunk, entry.size)
    padding = paddle.zeros([entry.chunk - (end - begin)], dtype=whole.dtype)
    return paddle.concat([whole.reshape([-1])[begin:end], padding])


def joined_chunks(rows: paddle.Tensor, shape: tuple[int, ...]) -> paddle.Tensor:
    """[S, c] or [S * c] as a tensor of `shape`, without the padding."""
    return rows.reshape([-1])[: math.prod(shape)].reshape(shape)
