"""Gradients of all ranks added up, and optimizer state divided over them (ZeRO stages 1 and 2, arXiv 1910.02054).

What a step does, on one process as on many:

    sync.begin(num_microbatches)
    ... backward pass; sync.after_backward(part) after each, where parts are what one pass reaches (pipeline chunks)
    sync.finish()                       # now sync.gradients() are complete
    norm = sync.global_norm()           # the same value on every rank
    sync.clip(norm, max_norm)
    optimizer.step(learning_rate)       # updates sync.own(name), then sync.publish()
    sync.clear()

Stage 0 all-reduces whole gradients once a step. Stage 1 reduce-scatters them, each rank updates its chunk of every
parameter, and the chunks are gathered. Stage 2 reduce-scatters after every microbatch and keeps only the chunk. A
parameter whose state is not divided (`placement.shard` of one rank) is treated as in stage 0, and one that no other
rank shares stays where it is: on one process nothing is copied.

Where collectives run beside the computation (NCCL), a bucket is sent as soon as a backward pass has completed its
gradients (stages 0 and 1: the step's last pass). Elsewhere it is sent at a fixed point, after the pass or at the end:
a rank whose batch reached no parameter of a bucket would otherwise wait for others that wait for it.

Every trainable parameter takes part in every exchange, as zeros where this rank has no gradient. A parameter for which
no rank has one is left alone, as on one process: each bucket carries a flag a parameter.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping

import numpy as np
import paddle

from erniekit.parallel import comm
from erniekit.parallel.buckets import DEFAULT_LIMIT, Bucket, Entry, is_eager, join_chunks, plan_buckets, take_chunk
from erniekit.parallel.comm import Group, Work
from erniekit.parallel.placement import Placement

# Stage 2: as many buckets travel at a time; more would hold more than the own chunks.
IN_FLIGHT = 2


class GradientSync:
    """The trainable parameters of this rank and their gradients.

    Args:
        parameters: this rank's parameters by name, in the model's order; frozen ones are passed over.
        placements: of each trainable parameter.
        world: all ranks, for the norm.
        zero_stage: 0, 1 or 2, see the module.
        master_grad: gradients of 16-bit parameters are added up and sent in fp32.
        parts: the part of the model that a parameter belongs to; 0 where it is not named.
        limit: elements of a bucket.
        overlap: send during the backward pass; by default where the backend runs collectives beside it.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, paddle.Tensor]],
        placements: Mapping[str, Placement],
        world: Group,
        zero_stage: int = 0,
        master_grad: bool = True,
        parts: Mapping[str, int] | None = None,
        limit: int = DEFAULT_LIMIT,
        overlap: bool | None = None,
    ) -> None:
        self.parameters = {name: p for name, p in parameters if not p.stop_gradient}
        self.world, self.zero_stage, self.master_grad = world, zero_stage, master_grad
        self.overlap = world.handle is not None if overlap is None else overlap
        parts = parts or {}
        self.entries = {
            name: Entry(name, tuple(p.shape), _dtype(p), placements[name], parts.get(name, 0))
            for name, p in self.parameters.items()
        }
        self.buckets = plan_buckets(list(self.entries.values()), limit)
        self._check_plan()
        self._bucket_of = {e.name: i for i, bucket in enumerate(self.buckets) for e in bucket.entries}
        self._fp32_sums: dict[str, paddle.Tensor] = {}
        self._flying: deque[tuple[int, Work, paddle.Tensor]] = deque()  # bucket, its exchange, what it sends
        self._rows: dict[int, paddle.Tensor] = {}  # bucket -> this rank's row, reduced as far as it is
        self._reduced: dict[str, paddle.Tensor] = {}
        self._arrived: Counter[str] = Counter()  # gradients of this pass so far
        self._usual = dict.fromkeys(self.entries, 0)  # gradients of a pass: several where recomputed blocks share
        self._uploaded_flags: dict[tuple[tuple[bool, ...], str], paddle.Tensor] = {}
        self._sent_early: set[str] = set()  # parameters of the buckets that went during this pass
        self._left: dict[int, int] = {}  # backward passes to come, by part
        self._due: dict[int, deque[int]] = {}  # buckets that this pass will send, by part
        if self.overlap:
            for name in self._bucket_of:
                self.parameters[name]._register_backward_hook(lambda name=name: self._on_gradient(name))

    @classmethod
    def single(cls, parameters: Iterable[tuple[str, paddle.Tensor]], master_grad: bool = True) -> "GradientSync":
        """For one process."""
        named = list(parameters)
        alone = Group((0,), 0)
        placement = Placement(alone, alone, alone, alone, alone, copies=1)
        return cls(named, {name: placement for name, _ in named}, alone, master_grad=master_grad)

    def _check_plan(self) -> None:
        """Ranks that exchange gradients must have planned the same buckets: other plans would add up strangers."""
        groups = {bucket.placement.gradient.ranks: bucket.placement.gradient for bucket in self.buckets}
        for ranks, group in groups.items():
            mine = [
                [bucket.width, *(entry.name for entry in bucket.entries)]
                for bucket in self.buckets
                if bucket.placement.gradient.ranks == ranks
            ]
            plans = comm.gather_objects(mine, group)
            assert all(plan == plans[0] for plan in plans), f"ranks {ranks} hold different parameters"

    # Gradients of this rank

    def begin(self, num_microbatches: int) -> None:
        """Before a step's first backward pass; every part of the model will have `num_microbatches` of them."""
        for part in {entry.part for entry in self.entries.values()}:
            self._left[part] = num_microbatches
            self._begin_pass(part)

    def _begin_pass(self, part: int) -> None:
        is_last = self.overlap and self._left.get(part) == 1
        self._due[part] = deque(
            i
            for i, bucket in enumerate(self.buckets)
            if bucket.part == part and (is_last or is_eager(bucket.placement, self.zero_stage))
        )

    def _on_gradient(self, name: str) -> None:
        """A backward pass has put a gradient into parameter.grad. Sends the buckets that it completes, in order."""
        self._arrived[name] += 1
        due = self._due.get(self.entries[name].part)
        while due and all(self._arrived[e.name] >= self._usual[e.name] > 0 for e in self.buckets[due[0]].entries):
            index = due.popleft()
            self._sent_early.update(entry.name for entry in self.buckets[index].entries)
            self._send(index)

    @paddle.no_grad()
    def after_backward(self, part: int = 0) -> None:
        """After each backward pass through a part of the model: its gradients are complete."""
        for name, entry in self.entries.items():
            if entry.part == part:
                late = name in self._sent_early and self.parameters[name].grad is not None
                assert not late, f"{name}: more gradients than in the passes before, after its bucket was sent"
                self._fold(name)
                self._usual[name] = max(self._usual[name], self._arrived.pop(name, 0))
        self._sent_early.clear()
        if not self.buckets:
            return
        assert part in self._due, "begin() comes before the first backward pass"
        due = self._due[part]
        while due:
            self._send(due.popleft())
        self._left[part] -= 1
        self._begin_pass(part)

    def _fold(self, name: str) -> None:
        """Move a 16-bit gradient into its fp32 sum (`master_grad`)."""
        parameter = self.parameters[name]
        if not self.master_grad or parameter.grad is None or parameter.dtype == paddle.float32:
            return
        gradient = parameter.grad.astype("float32")
        total = self._fp32_sums.get(name)
        self._fp32_sums[name] = gradient if total is None else total.add_(gradient)
        parameter.grad = None

    # Exchange

    @paddle.no_grad()
    def _send(self, index: int) -> None:
        """Start the first exchange of a bucket. Its gradients are taken out of the parameters."""
        bucket = self.buckets[index]
        ranks = bucket.placement.shard.size
        found = [self._take(entry.name) for entry in bucket.entries]
        dtype = bucket.gradient_dtype(self.master_grad)
        pieces = [_rows(gradient, entry, dtype) for gradient, entry in zip(found, bucket.entries, strict=True)]
        flags = self._flags_of(tuple(gradient is not None for gradient in found), dtype)
        matrix = paddle.concat([*pieces, flags.expand([ranks, len(found)])], axis=1)
        del found, pieces
        if ranks > 1:
            work = comm.start_reduce_scatter(matrix, bucket.placement.shard)
        else:
            work = comm.start_all_reduce(matrix, _sums_over(bucket)[0])
        self._flying.append((index, work, matrix))
        while self.zero_stage == 2 and len(self._flying) > (IN_FLIGHT if self.overlap else 0):
            self._settle()

    def _flags_of(self, present: tuple[bool, ...], dtype: str) -> paddle.Tensor:
        """[1, n] which gradients a bucket carries. It is the same from step to step, and is uploaded once."""
        if (present, dtype) not in self._uploaded_flags:
            self._uploaded_flags[present, dtype] = paddle.to_tensor([present]).astype(dtype)
        return self._uploaded_flags[present, dtype]

    def _take(self, name: str) -> paddle.Tensor | None:
        """The gradient so far, which the caller now owns; None if there is none."""
        self._fold(name)
        parameter = self.parameters[name]
        if parameter.grad is None:
            return self._fp32_sums.pop(name, None)
        gradient = parameter.grad.reshape([-1])  # a view: the tensor itself is emptied when .grad is set to None
        parameter.grad = None
        return gradient

    def _settle(self) -> None:
        """Wait for the bucket that was sent first, and add its row to those of the passes before."""
        index, work, _ = self._flying.popleft()
        row = work.wait().reshape([-1])
        before = self._rows.get(index)
        self._rows[index] = row if before is None else before.add_(row)

    @paddle.no_grad()
    def finish(self) -> None:
        """After a step's last backward pass: exchange what has not been exchanged yet."""
        sent = {index for index, *_ in self._flying} | self._rows.keys()
        for index in range(len(self.buckets)):
            if index not in sent:
                self._send(index)
        while self._flying:
            self._settle()
        arrived: list[tuple[Entry, paddle.Tensor]] = []
        flags: list[paddle.Tensor] = []
        for index, bucket in enumerate(self.buckets):
            row, groups = self._rows.pop(index), _sums_over(bucket)
            for group in groups if bucket.placement.shard.size > 1 else groups[1:]:
                comm.all_reduce_(row, group)
            *chunks, bucket_flags = paddle.split(row, bucket.sections)
            arrived += zip(bucket.entries, chunks, strict=True)
            flags.append(bucket_flags.astype("float32"))
        # One read for all buckets: which parameters have a gradient on any rank decides what the optimizer launches.
        has_gradient = (paddle.concat(flags).numpy() > 0.0).tolist() if flags else []
        for (entry, chunk), has in zip(arrived, has_gradient, strict=True):
            if has:
                self._reduced[entry.name] = chunk if entry.placement.shard.size > 1 else chunk.reshape(entry.shape)

    # After finish()

    def gradients(self) -> dict[str, paddle.Tensor]:
        """The step's gradients, of each parameter for which a rank has one: the whole tensor, or where the state is
        divided this rank's chunk [c].
        """
        found = {}
        for name, parameter in self.parameters.items():
            gradient = self._reduced.get(name, self._fp32_sums.get(name, parameter.grad))
            if gradient is not None:
                found[name] = gradient
        return found

    @paddle.no_grad()
    def squared_norms(self) -> paddle.Tensor:
        """The squared norm of each of `gradients()`, on the device: fp32 [n]."""
        squares = [paddle._C_ops.squared_l2_norm(gradient.astype("float32")) for gradient in self.gradients().values()]
        return paddle.concat(squares) if squares else paddle.zeros([0])

    def global_norm(self, squares: np.ndarray | None = None) -> float:
        """Euclidean norm of the whole model's gradients (squares summed in fp32 a tensor, in fp64 over tensors and
        ranks), each element counted once whatever the number of ranks that hold it. `squares`: squared_norms(), where
        the caller has read them together with other numbers.
        """
        squares = self.squared_norms().numpy() if squares is None else squares
        placements = (self.entries[name].placement for name in self.gradients())
        parts = [
            square * placement.shard.size / placement.copies
            for square, placement in zip(squares.tolist(), placements, strict=True)
        ]
        return math.sqrt(comm.sum_floats(np.array([math.fsum(parts)]), self.world).item())

    @paddle.no_grad()
    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all gradients by max_norm / norm where norm exceeds max_norm > 0 (Pascanu et al. 2013, arXiv 1211.5063,
        algorithm 1)."""
        if max_norm <= 0.0 or norm <= max_norm:
            return
        for gradient in self.gradients().values():
            gradient.scale_(max_norm / norm)

    def held_bytes(self) -> int:
        """Bytes of gradients that this rank holds now; parallel.buckets.gradient_bytes between microbatches."""
        held = [p.grad for p in self.parameters.values() if p.grad is not None]
        held += [*self._fp32_sums.values(), *self._rows.values(), *self._reduced.values()]
        held += [matrix for *_, matrix in self._flying]
        return sum(tensor.size * tensor.element_size() for tensor in held)

    def clear(self) -> None:
        """Forget the gradients and free their memory."""
        self._reduced.clear()
        self._fp32_sums.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    # Chunks of parameters and of what belongs to them

    @paddle.no_grad()
    def own(self, name: str) -> paddle.Tensor:
        """What this rank updates of a parameter: the parameter itself, or where the state is divided its chunk [c]
        (padded with zeros).
        """
        entry, parameter = self.entries[name], self.parameters[name]
        shard = entry.placement.shard
        if shard.size == 1:
            return parameter
        begin = min(shard.index * entry.chunk, entry.size)
        end = min(begin + entry.chunk, entry.size)
        padding = paddle.zeros([entry.chunk - (end - begin)], dtype=parameter.dtype)
        return paddle.concat([parameter.reshape([-1])[begin:end], padding])

    @paddle.no_grad()
    def publish(self, updated: Mapping[str, paddle.Tensor]) -> None:
        """Put the updated chunks of all ranks together into the parameters. A parameter that `updated` does not name
        stays as it is.
        """
        for bucket in self.buckets:
            shard = bucket.placement.shard
            if shard.size == 1:
                continue
            chunks = [updated[e.name] if e.name in updated else self.own(e.name) for e in bucket.entries]
            matrix = comm.all_gather(paddle.concat(chunks), shard).reshape([shard.size, bucket.columns])
            for entry, rows in zip(bucket.entries, paddle.split(matrix, bucket.sections[:-1], axis=1), strict=True):
                paddle.assign(_whole(rows, entry.shape), self.parameters[entry.name])

    @paddle.no_grad()
    def whole(self, name: str, chunk: paddle.Tensor) -> paddle.Tensor:
        """As `gather`, on the device."""
        entry = self.entries[name]
        if entry.placement.shard.size == 1:
            return chunk
        return _whole(comm.all_gather(chunk, entry.placement.shard), entry.shape)

    def gather(self, name: str, chunk: paddle.Tensor) -> np.ndarray:
        """A tensor of a parameter's shape from the chunks [c] that the ranks hold: every rank of its shard group has to
        call this. Where nothing is divided, `chunk` as it is.
        """
        entry = self.entries[name]
        if entry.placement.shard.size == 1:
            return chunk.numpy()
        return join_chunks(comm.all_gather(chunk, entry.placement.shard).numpy(), entry.shape)

    def scatter(self, name: str, whole: np.ndarray) -> np.ndarray:
        """This rank's chunk [c] of a tensor of a parameter's shape; the whole where nothing is divided."""
        shard = self.entries[name].placement.shard
        return whole if shard.size == 1 else take_chunk(whole, shard.index, shard.size)


def _sums_over(bucket: Bucket) -> list[Group]:
    """The groups over which rows are added up, after the chunks are where they belong."""
    placement = bucket.placement
    return [group for group in (placement.replica, placement.partial, placement.ends) if group.size > 1]


def _rows(gradient: paddle.Tensor | None, entry: Entry, dtype: str) -> paddle.Tensor:
    """A gradient [...] (None: zeros) as [S, c]."""
    ranks = entry.placement.shard.size
    if gradient is None:
        return paddle.zeros([ranks, entry.chunk], dtype=dtype)
    flat = gradient.reshape([-1]).astype(dtype)
    if entry.placement.share != 1.0:
        flat = flat * entry.placement.share
    missing = ranks * entry.chunk - entry.size
    if missing:
        flat = paddle.concat([flat, paddle.zeros([missing], dtype=dtype)])
    return flat.reshape([ranks, entry.chunk])


def _whole(rows: paddle.Tensor, shape: tuple[int, ...]) -> paddle.Tensor:
    """[S, c] as a tensor of `shape`, without the padding."""
    return rows.reshape([-1])[: math.prod(shape)].reshape(shape)


def _dtype(parameter: paddle.Tensor) -> str:
    return str(parameter.dtype).removeprefix("paddle.")
