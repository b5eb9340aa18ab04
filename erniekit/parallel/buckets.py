"""Cutting parameters into equal chunks and collecting them into buckets: arithmetic alone, no tensors.

A parameter of n elements that S ranks share is flattened, padded with zeros to S * c, c = ceil(n / S), and rank i owns
elements i * c .. (i + 1) * c (ZeRO stage 1 and 2, Rajbhandari et al. 2020, arXiv 1910.02054, section 5). Every
parameter is cut, whatever its size, so that the ranks are equal to within one element a parameter.

A bucket is what one collective carries: parameters of one placement, one type, and one part of the model (what one
backward pass reaches). It is a matrix [S, width]: row i holds the i-th chunk of each parameter side by side, and then
one flag a parameter, which counts the ranks that had a gradient for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.parallel.placement import Placement

DEFAULT_LIMIT = 16 * 2**20  # elements: 64 MiB of float32, enough that latency is nothing beside the transfer


def chunk_size(num_elements: int, num_ranks: int) -> int:
    """Elements of one rank's chunk; the last rank's may be padding in part."""
    return -(-num_elements // num_ranks)


def take_chunk(array: np.ndarray, index: int, num_ranks: int) -> np.ndarray:
    """Chunk `index` [c] of an array of any shape."""
    size = chunk_size(array.size, num_ranks)
    chunk = array.reshape(-1)[index * size : (index + 1) * size]
    return np.pad(chunk, (0, size - chunk.size))


def join_chunks(chunks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array [shape] whose chunks lie one behind the other in `chunks` [S * c]."""
    return chunks.reshape(-1)[: int(np.prod(shape))].reshape(shape)


@dataclass(frozen=True)
class Entry:
    """One trainable parameter as the plan sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    part: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))

    @property
    def chunk(self) -> int:
        """Elements of one rank's chunk."""
        return chunk_size(self.size, self.placement.shard.size)

    def gradient_dtype(self, master_grad: bool) -> str:
        """The type in which its gradient is added up and sent."""
        return "float32" if master_grad else self.dtype


@dataclass(frozen=True)
class Bucket:
    """Parameters that are reduced and gathered together."""

    entries: tuple[Entry, ...]

    @property
    def placement(self) -> Placement:
        """That of each of its parameters."""
        return self.entries[0].placement

    @property
    def part(self) -> int:
        """The part of the model that each of its parameters belongs to."""
        return self.entries[0].part

    def gradient_dtype(self, master_grad: bool) -> str:
        """The type that it carries."""
        return self.entries[0].gradient_dtype(master_grad)

    @property
    def columns(self) -> int:
        """Elements of one row without the flags."""
        return sum(entry.chunk for entry in self.entries)

    @property
    def width(self) -> int:
        """Elements of one row."""
        return self.columns + len(self.entries)

    @property
    def sections(self) -> list[int]:
        """Widths of a row's pieces: a chunk a parameter, then the flags."""
        return [*(entry.chunk for entry in self.entries), len(self.entries)]


def is_local(placement: Placement) -> bool:
    """Whether no other rank has a share in the parameter's gradient: nothing is to be sent."""
    return max(group.size for group in (placement.gradient, placement.partial, placement.ends)) == 1


def plan_buckets(entries: Sequence[Entry], limit: int = DEFAULT_LIMIT) -> list[Bucket]:
    """Buckets of at most `limit` elements (a larger parameter has one to itself) in the order in which a backward pass
    completes them: from the last parameter to the first. Parameters that no other rank shares are left out.

    The order depends on names, shapes and placements alone, so that ranks that hold the same parameters send the same
    buckets in the same order, whatever their batches hold.
    """
    waiting: dict[tuple, list[int]] = {}
    full: list[list[int]] = []
    for index in reversed(range(len(entries))):
        entry = entries[index]
        if is_local(entry.placement):
            continue
        bucket = waiting.setdefault(_key(entry), [])
        if bucket and sum(entries[i].size for i in bucket) + entry.size > limit:
            full.append(bucket)
            bucket = waiting[_key(entry)] = []
        bucket.append(index)
    ordered = sorted(full + list(waiting.values()), key=lambda bucket: -bucket[-1])
    return [Bucket(tuple(entries[i] for i in bucket)) for bucket in ordered]


def _key(entry: Entry) -> tuple:
    """What the parameters of one bucket have in common."""
    p = entry.placement
    groups = (p.gradient, p.shard, p.replica, p.partial, p.ends)
    return entry.part, entry.dtype, p.copies, *(group.ranks for group in groups)


def state_bytes(entries: Iterable[Entry], divided: bool = True) -> int:
    """Bytes of AdamW's state on this rank: two fp32 moments of each chunk, a fp32 master copy for 16-bit parameters,
    and two fp32 powers of the betas a parameter. Not `divided`: what it would be if each rank held all of it.
    """
    return sum(
        (entry.chunk if divided else entry.size) * (8 if _width(entry.dtype) == 4 else 12) + 8 for entry in entries
    )


def is_eager(placement: Placement, zero_stage: int) -> bool:
    """Whether gradients are exchanged after every backward pass, so that only a chunk of them is kept."""
    return zero_stage == 2 and placement.shard.size > 1


def gradient_bytes(entries: Iterable[Entry], zero_stage: int, master_grad: bool) -> int:
    """Bytes of gradients on this rank between two microbatches: whole ones, or in stage 2 the own chunk and a flag
    (beside them buckets that are on their way, where exchanges overlap with computation).
    """
    return sum(
        (entry.chunk + 1 if is_eager(entry.placement, zero_stage) else entry.size)
        * _width(entry.gradient_dtype(master_grad))
        for entry in entries
    )


def _width(dtype: str) -> int:
    """Bytes of an element."""
    return 4 if dtype == "float32" else 2


def step_traffic(
    buckets: Iterable[Bucket], zero_stage: int, num_microbatches: int, master_grad: bool, num_ranks: int
) -> dict[str, int]:
    """Bytes that this rank sends for gradients, their norm and parameters in one step, by kind, as comm counts them.

    Over n ranks a reduce-scatter sends (n - 1) / n of the matrix, an all-gather n - 1 times the own chunk, and an
    all-reduce 2 (n - 1) / n of the tensor. Stage 2 reduce-scatters after every microbatch, the others once a step.
    `master_grad`: gradients of 16-bit parameters travel in fp32. The norm is one fp64 number from each of `num_ranks`.
    """
    sent = {"reduce_scatter": 0, "all_reduce": 0, "all_gather": 0, "host": 8 * (num_ranks - 1)}
    for bucket in buckets:
        p, own = bucket.placement, _width(bucket.entries[0].dtype)
        gradient = _width(bucket.gradient_dtype(master_grad))
        times = num_microbatches if is_eager(p, zero_stage) else 1
        sent["reduce_scatter"] += times * (p.shard.size - 1) * bucket.width * gradient
        for group in (p.replica, p.partial, p.ends):
            sent["all_reduce"] += 2 * (group.size - 1) * bucket.width * gradient // group.size
        sent["all_gather"] += (p.shard.size - 1) * bucket.columns * own
    return sent
