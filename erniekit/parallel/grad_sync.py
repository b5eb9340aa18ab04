"""Gradients summed over ranks, in buckets, as ZeRO stages 0 to 3 need them (Rajbhandari et al. 2020, arXiv
1910.02054).

What a step does, on one process as on many:

    sync.begin(num_microbatches)
    ... backward pass; sync.after_backward(model_chunk) after each
    gradients = sync.finish()                               # complete, by name
    norm = global_norm(gradients, parameters.entries, world)  # parallel/grad_clip.py; the same value on every rank
    clip_(gradients, norm, max_norm)
    optimizer.step(gradients, learning_rate)                # updates local chunks, then parameters.publish()
    sync.clear()

Stage 0 all-reduces whole gradients once a step. Stage 1 reduce-scatters them, each rank updates its chunk of every
parameter, and the chunks are gathered (parallel/zero.py). Stage 2 reduce-scatters after every microbatch and keeps only
the chunk. Stage 3 does the same, but the gradients of a block whose weights are divided are sent as soon as its
backward pass is done (parallel/sharded_units.py). A parameter whose state is not divided (`placement.shard` of one
rank) is treated as in stage 0, and the gradient of one that no other rank shares is left where it is: on one process
nothing is copied.

Where collectives run while the computation continues (NCCL), a bucket is sent as soon as a backward pass has completed
its gradients (stages 0 and 1: the step's last pass). Elsewhere it is sent at a fixed point, after the pass or at the
end: a rank whose batch reached no parameter of a bucket would otherwise wait for others that wait for it.

Every trainable parameter is part of every exchange, as zeros where this rank has no gradient. A parameter for which no
rank has one is not updated, as on one process: each bucket carries a flag for every parameter.
"""

from collections import Counter, deque

import paddle

from erniekit.parallel import comm
from erniekit.parallel.buckets import Bucket, Entry, is_eager
from erniekit.parallel.comm import Work
from erniekit.parallel.memory import gradient_bytes, state_bytes
from erniekit.parallel.process_group import Group
from erniekit.parallel.zero import ShardedParameters
from erniekit.utils import heartbeat
from erniekit.utils.wording import count_of

# In ZeRO stages 2 and 3, the buckets that may be under way at a time; more would need more memory than the chunks.
IN_FLIGHT = 2


class GradientSync:
    """The gradients of this rank's trainable parameters.

    Args:
        parameters: the trainable parameters and their buckets.
        zero_stage: 0 to 3, see the module.
        master_grad: gradients of 16-bit parameters are added up and sent in fp32.
        overlap: send during the backward pass, where the backend runs collectives while the computation continues.
    """

    def __init__(
        self, parameters: ShardedParameters, zero_stage: int = 0, master_grad: bool = True, overlap: bool = False
    ) -> None:
        self.parameters, self.zero_stage = parameters, zero_stage
        # Divided weights give their buckets a fixed order, which does not allow for early ones.
        self.master_grad, self.overlap = master_grad, overlap and zero_stage < 3
        if parameters.units is not None:
            parameters.units.on_gradients = self._send_unit
        self._tensors, self._entries, self._buckets = parameters.tensors, parameters.entries, parameters.buckets
        self._fp32_sums: dict[str, paddle.Tensor] = {}
        self._in_flight: deque[tuple[int, Work, paddle.Tensor]] = deque()  # bucket, its exchange, what it sends
        self._rows: dict[int, paddle.Tensor] = {}  # bucket -> this rank's row, reduced as far as it is
        self._arrived: Counter[str] = Counter()  # gradients of this pass so far
        self._usual = dict.fromkeys(self._entries, 0)  # gradients of a pass: several where recomputed blocks share
        self._uploaded_flags: dict[tuple[tuple[bool, ...], str], paddle.Tensor] = {}
        self._sent_early: set[str] = set()  # parameters of the buckets that were sent during this pass
        self._passes_left: dict[int, int] = {}  # backward passes to come, by chunk of the model
        self._due: dict[int, deque[int]] = {}  # buckets that this pass will send, by chunk of the model
        if self.overlap:
            for name in (entry.name for bucket in self._buckets for entry in bucket.entries):
                self._tensors[name]._register_backward_hook(lambda name=name: self._on_gradient(name))

    # Gradients of this rank

    def begin(self, num_microbatches: int) -> None:
        """Before a step's first backward pass; every chunk of the model will have `num_microbatches` of them. Of a
        chunk without parameters nothing is sent.
        """
        for model_chunk in {entry.model_chunk for entry in self._entries.values()}:
            self._passes_left[model_chunk] = num_microbatches
            self._begin_pass(model_chunk)

    def _begin_pass(self, model_chunk: int) -> None:
        is_last = self.overlap and self._passes_left.get(model_chunk) == 1
        self._due[model_chunk] = deque(
            i
            for i, bucket in enumerate(self._buckets)
            if bucket.model_chunk == model_chunk and (is_last or is_eager(bucket.placement, self.zero_stage))
        )

    def _on_gradient(self, name: str) -> None:
        """A backward pass has put a gradient into parameter.grad. Sends the buckets that it completes, in order."""
        self._arrived[name] += 1
        due = self._due.get(self._entries[name].model_chunk)
        while due and all(self._arrived[e.name] >= self._usual[e.name] > 0 for e in self._buckets[due[0]].entries):
            index = due.popleft()
            self._sent_early.update(entry.name for entry in self._buckets[index].entries)
            self._send(index)

    @paddle.no_grad()
    def after_backward(self, model_chunk: int = 0) -> None:
        """After each backward pass through a chunk of the model: its gradients are complete."""
        if self.parameters.units is not None:
            self.parameters.units.finish_backward(model_chunk)
        for name, entry in self._entries.items():
            if entry.model_chunk == model_chunk:
                late = name in self._sent_early and self._tensors[name].grad is not None
                assert not late, f"{name}: more gradients than in the passes before, after its bucket was sent"
                self._fold(name)
                self._usual[name] = max(self._usual[name], self._arrived.pop(name, 0))
        self._sent_early.clear()
        if not self._buckets:
            return
        assert self._due, "begin() comes before the first backward pass"
        if model_chunk not in self._due:  # nothing of this chunk is trained
            return
        due = self._due[model_chunk]
        while due:
            self._send(due.popleft())
        self._passes_left[model_chunk] -= 1
        self._begin_pass(model_chunk)

    @paddle.no_grad()
    def _send_unit(self, model_chunk: int, unit: str) -> None:
        """Send the buckets of a block."""
        due = self._due[model_chunk]
        for index in [index for index in due if self._buckets[index].unit == unit]:
            due.remove(index)
            self._sent_early.update(entry.name for entry in self._buckets[index].entries)
            self._send(index)

    def _fold(self, name: str) -> None:
        """Move a 16-bit gradient into its fp32 sum (`master_grad`)."""
        parameter = self._tensors[name]
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
        bucket = self._buckets[index]
        ranks = bucket.placement.shard.size
        gradients = [self._take(entry.name) for entry in bucket.entries]
        dtype = bucket.gradient_dtype(self.master_grad)
        rows = [_rows(gradient, entry, dtype) for gradient, entry in zip(gradients, bucket.entries, strict=True)]
        flags = self._flags_of(tuple(gradient is not None for gradient in gradients), dtype)
        matrix = paddle.concat([*rows, flags.expand([ranks, len(gradients)])], axis=1)
        del gradients, rows
        if ranks > 1:
            work = comm.start_reduce_scatter(matrix, bucket.placement.shard)
        else:
            work = comm.start_all_reduce(matrix, _sums_over(bucket)[0])
        self._in_flight.append((index, work, matrix))
        while self.zero_stage >= 2 and len(self._in_flight) > (IN_FLIGHT if self.overlap else 0):
            self._settle()

    def _flags_of(self, present: tuple[bool, ...], dtype: str) -> paddle.Tensor:
        """[1, n] which gradients a bucket carries. It is the same from step to step, and is uploaded once."""
        if (present, dtype) not in self._uploaded_flags:
            self._uploaded_flags[present, dtype] = paddle.to_tensor([present]).astype(dtype)
        return self._uploaded_flags[present, dtype]

    def _take(self, name: str) -> paddle.Tensor | None:
        """The gradient so far, which the caller now owns; None if there is none."""
        self._fold(name)
        parameter = self._tensors[name]
        if parameter.grad is None:
            return self._fp32_sums.pop(name, None)
        gradient = parameter.grad.reshape([-1])  # a view: the tensor itself is emptied when .grad is set to None
        parameter.grad = None
        return gradient

    def _settle(self) -> None:
        """Wait for the bucket that was sent first, and add its row to those of the passes before."""
        index, work, _ = self._in_flight.popleft()
        row = work.wait().reshape([-1])
        before = self._rows.get(index)
        self._rows[index] = row if before is None else before.add_(row)

    @paddle.no_grad()
    def finish(self) -> dict[str, paddle.Tensor]:
        """After a step's last backward pass: exchange what has not been exchanged yet.

        Returns:
            The step's gradient of each parameter for which a rank has one: the whole tensor, or where the optimizer
            state is divided this rank's chunk [c].
        """
        sent = {index for index, *_ in self._in_flight} | self._rows.keys()
        for index in range(len(self._buckets)):
            if index not in sent:
                self._send(index)
        while self._in_flight:
            self._settle()
        arrived: list[tuple[Entry, paddle.Tensor]] = []
        flags: list[paddle.Tensor] = []
        for index, bucket in enumerate(self._buckets):
            row, groups = self._rows.pop(index), _sums_over(bucket)
            for group in groups if bucket.placement.shard.size > 1 else groups[1:]:
                comm.all_reduce_(row, group)
            *chunks, bucket_flags = paddle.split(row, bucket.sections)
            arrived += zip(bucket.entries, chunks, strict=True)
            flags.append(bucket_flags.astype("float32"))
        reduced: dict[str, paddle.Tensor] = {}
        # One read for all buckets: which parameters have a gradient on any rank decides what the optimizer launches.
        with heartbeat.device_read():
            has_gradient = (paddle.concat(flags).numpy() > 0.0).tolist() if flags else []
        for (entry, chunk), has in zip(arrived, has_gradient, strict=True):
            if has:
                reduced[entry.name] = chunk if entry.placement.shard.size > 1 else chunk.reshape(entry.shape)
        complete = {
            name: reduced.get(name, self._fp32_sums.get(name, parameter.grad))
            for name, parameter in self._tensors.items()
        }
        return {name: gradient for name, gradient in complete.items() if gradient is not None}

    def memory_line(self, moment_dtype: str = "fp32") -> str:
        """One line for the log: what optimizer state and gradients take on this rank, by formula."""
        entries = self._entries.values()
        own, whole = (state_bytes(entries, divided, moment_dtype) for divided in (True, False))
        gradients = gradient_bytes(entries, self.zero_stage, self.master_grad)
        return (
            f"optimizer state: {_mib(own)} on this rank, {_mib(whole)} if it were not divided; gradients "
            f"{_mib(gradients)}, sent in {count_of(len(self._buckets), 'bucket')} (sharding stage {self.zero_stage})"
        )

    def clear(self) -> None:
        """Drop the gradients and free their memory."""
        self._fp32_sums.clear()
        for parameter in self._tensors.values():
            parameter.grad = None


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


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
