"""Bytes that one rank stores for weights, optimizer state and gradients, by formula from sizes alone. How many
microbatches' activations it keeps: parallel/pipeline_schedule.py (`peak_live`).
"""

from collections import Counter
from collections.abc import Iterable

from erniekit.parallel.buckets import Entry, is_eager, item_bytes

MOMENT_BLOCK = 256  # numbers of an 8-bit moment that have a common scale
_LEAST_IN_BLOCKS = 4096


def is_stored_in_blocks(num_elements: int) -> bool:
    """Whether moment_dtype: 8bit stores a moment of this many numbers in 8 bits; fewer stay in fp32."""
    return num_elements >= _LEAST_IN_BLOCKS


def moment_bytes(num_elements: int, moment_dtype: str) -> int:
    """Bytes of one moment: fp32, bf16, or 8 bits a number and an fp32 scale a block (8bit)."""
    if moment_dtype == "8bit" and is_stored_in_blocks(num_elements):
        return num_elements + 4 * -(-num_elements // MOMENT_BLOCK)
    return num_elements * (2 if moment_dtype == "bf16" else 4)


def state_bytes(entries: Iterable[Entry], divided: bool = True, moment_dtype: str = "fp32") -> int:
    """Bytes of the optimizer's state on this rank: for AdamW two moments of each chunk and two fp32 powers of the betas
    a parameter, for Muon one moment, and a fp32 master copy for 16-bit parameters. Not `divided`: what it would be if
    each rank had all of it.
    """
    total = 0
    for entry in entries:
        size = entry.chunk if divided else entry.size
        total += entry.num_moments * moment_bytes(size, moment_dtype) + (8 if entry.num_moments == 2 else 0)
        total += 0 if item_bytes(entry.dtype) == 4 else 4 * size
    return total


def weight_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of parameters on this rank between their uses: of a divided one its chunk."""
    return sum((entry.chunk if entry.unit else entry.size) * item_bytes(entry.dtype) for entry in entries)


def unit_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of the weights of the largest unit, which is whole while it computes, with the padding of its chunks; 0
    where nothing is divided.
    """
    sizes: Counter[str] = Counter()
    for entry in entries:
        if entry.unit:
            sizes[entry.unit] += entry.placement.shard.size * entry.chunk * item_bytes(entry.dtype)
    return max(sizes.values(), default=0)


def gradient_bytes(entries: Iterable[Entry], zero_stage: int, master_grad: bool) -> int:
    """Bytes of gradients on this rank between two microbatches: whole ones, or in stages 2 and 3 its chunk and a flag
    (in addition to buckets under way, where exchanges overlap with computation).
    """
    return sum(
        (entry.chunk + 1 if is_eager(entry.placement, zero_stage) else entry.size)
        * item_bytes(entry.gradient_dtype(master_grad))
        for entry in entries
    )
