"""Bytes that one rank stores for optimizer state and gradients, by formula from sizes alone. How many microbatches'
activations it keeps: parallel/pipeline_schedule.py (`peak_live`).
"""

from collections.abc import Iterable

from erniekit.parallel.buckets import Entry, is_eager, item_bytes


def state_bytes(entries: Iterable[Entry], divided: bool = True) -> int:
    """Bytes of AdamW's state on this rank: two fp32 moments of each chunk, a fp32 master copy for 16-bit parameters,
    and two fp32 powers of the betas a parameter. Not `divided`: what it would be if each rank had all of it.
    """
    return sum(
        (entry.chunk if divided else entry.size) * (8 if item_bytes(entry.dtype) == 4 else 12) + 8 for entry in entries
    )


def gradient_bytes(entries: Iterable[Entry], zero_stage: int, master_grad: bool) -> int:
    """Bytes of gradients on this rank between two microbatches: whole ones, or in stage 2 this rank's chunk and a flag
    (in addition to buckets under way, where exchanges overlap with computation).
    """
    return sum(
        (entry.chunk + 1 if is_eager(entry.placement, zero_stage) else entry.size)
        * item_bytes(entry.gradient_dtype(master_grad))
        for entry in entries
    )
