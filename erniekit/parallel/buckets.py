"""Parameters divided into equal chunks and grouped into buckets: arithmetic alone, no tensors.

A parameter of n elements whose state is divided over S ranks is flattened and padded with zeros to S * c elements, c =
ceil(n / S); rank i updates elements i * c .. (i + 1) * c (ZeRO stage 1 and 2, Rajbhandari et al. 2020, arXiv
1910.02054, section 5). Every parameter is divided, whatever its size, so that the ranks differ by at most one element a
parameter.

A bucket is what one collective carries: parameters of one placement, one type, one chunk of the model (what one
backward pass reaches), and in stage 3 one block. It is a matrix [S, width]: row i consists of the i-th chunk of each
parameter and then of one flag for each parameter, which counts the ranks that had a gradient for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.parallel.placement import Placement

DEFAULT_LIMIT = 16 * 2**20  # elements: 64 MiB of float32, enough that latency is negligible


def chunk_size(num_elements: int, num_ranks: int) -> int:
    """The number of elements of one rank's chunk; the last chunk may end with padding."""
    return -(-num_elements // num_ranks)


def take_chunk(array: np.ndarray, index: int, num_ranks: int) -> np.ndarray:
    """Chunk `index` [c] of an array of any shape."""
    size = chunk_size(array.size, num_ranks)
    chunk = array.reshape(-1)[index * size : (index + 1) * size]
    return np.pad(chunk, (0, size - chunk.size))


@dataclass(frozen=True)
class Entry:
    """One trainable parameter as the plan sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: Placement
    model_chunk: int = 0
    num_moments: int = 2  # of the optimizer's state: AdamW's two, or Muon's momentum
    unit: str = ""  # the block with which its weight is gathered (parallel/sharded_units.py); "": the weight is whole

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def chunk(self) -> int:
        """The number of elements of one rank's chunk."""
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
        """The placement of each of its parameters."""
        return self.entries[0].placement

    @property
    def model_chunk(self) -> int:
        """The chunk of the model that each of its parameters belongs to."""
        return self.entries[0].model_chunk

    @property
    def unit(self) -> str:
        """The block with which its weights are gathered; "": they are whole."""
        return self.entries[0].unit

    def gradient_dtype(self, master_grad: bool) -> str:
        """The type of the gradients in it."""
        return self.entries[0].gradient_dtype(master_grad)

    @property
    def columns(self) -> int:
        """The number of elements of one row without the flags."""
        return sum(entry.chunk for entry in self.entries)

    @property
    def width(self) -> int:
        """The number of elements of one row."""
        return self.columns + len(self.entries)

    @property
    def sections(self) -> list[int]:
        """The widths into which a row is split: the chunk of each parameter, then the flags."""
        return [*(entry.chunk for entry in self.entries), len(self.entries)]


def is_local(placement: Placement) -> bool:
    """Whether no other rank contributes to the parameter's gradient, so that nothing has to be sent."""
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
    """The properties that all parameters of one bucket share."""
    p = entry.placement
    groups = (p.gradient, p.shard, p.replica, p.partial, p.ends)
    return entry.model_chunk, entry.unit, entry.dtype, p.copies, *(group.ranks for group in groups)


def is_eager(placement: Placement, zero_stage: int) -> bool:
    """Whether gradients are exchanged after every backward pass, so that only a chunk of them is stored."""
    return zero_stage >= 2 and placement.shard.size > 1


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a floating type."""
    return 4 if dtype == "float32" else 2
