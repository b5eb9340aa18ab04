"""Collectives over TCP links, on the bytes of tensors; a dtype is named as Paddle and numpy name it.

Sums and maxima are taken in the group's order, so every rank gets the same bits; 16-bit floats are summed in float32
and rounded once.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from erniekit.parallel.process_group import Group
from erniekit.parallel.tcp_transport import Links
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16

# Up to this many bytes an all-reduce sends its tensor whole to everyone: one round of messages instead of two.
WHOLE_BYTES = 32 << 10
_UFUNCS = {"sum": np.add, "max": np.maximum}


def split(data: memoryview, counts: Sequence[int], unit_bytes: int) -> list[memoryview]:
    """Consecutive spans of counts[i] units."""
    return [data[start * unit_bytes : end * unit_bytes] for start, end in pairwise(accumulate(counts, initial=0))]


def exchange(
    links: Links, kind: str, group: Group, outgoing: Sequence[memoryview], incoming: Sequence[memoryview]
) -> None:
    """Send outgoing[i] to rank i of the group and receive incoming[i] from it. This rank's entries are ignored, and
    empty ones are not sent: both sides know their lengths.
    """
    others = group.others()
    links.exchange(
        kind,
        [(group.ranks[i], outgoing[i]) for i in others if len(outgoing[i])],
        [(group.ranks[i], incoming[i]) for i in reversed(others) if len(incoming[i])],
    )


def gather(links: Links, kind: str, group: Group, data: memoryview, out: memoryview) -> None:
    """`out` becomes the `data` of every rank, all of one length, one after the other."""
    chunks = split(out, [1] * group.size, len(data))
    chunks[group.index][:] = data
    exchange(links, kind, group, [data] * group.size, chunks)


def all_reduce(links: Links, group: Group, data: memoryview, dtype: str, op: str) -> None:
    """`data` becomes the sum or the maximum over the group."""
    if len(data) <= WHOLE_BYTES:
        rows = np.empty(group.size * len(data), np.uint8).data
        gather(links, "all_reduce", group, data, rows)
        _write(data, dtype, _combined(split(rows, [1] * group.size, len(data)), dtype, op))
        return
    item_bytes = _item_bytes(dtype)
    bounds = [rank * (len(data) // item_bytes) // group.size for rank in range(group.size + 1)]
    chunks = split(data, [end - start for start, end in pairwise(bounds)], item_bytes)
    _reduce_chunks(links, "all_reduce", group, chunks, chunks[group.index], dtype, op)
    exchange(links, "all_reduce", group, [chunks[group.index]] * group.size, chunks)


def reduce_scatter(links: Links, group: Group, data: memoryview, out: memoryview, dtype: str) -> None:
    """`out` becomes this rank's chunk of the sum of `data`, which is divided into `size` equal chunks."""
    _reduce_chunks(links, "reduce_scatter", group, split(data, [1] * group.size, len(out)), out, dtype, "sum")


def _reduce_chunks(
    links: Links, kind: str, group: Group, chunks: list[memoryview], out: memoryview, dtype: str, op: str
) -> None:
    """`out` becomes the sum or maximum of every rank's chunks[index of this rank]."""
    local = chunks[group.index]
    received = [local if i == group.index else np.empty(len(local), np.uint8).data for i in range(group.size)]
    exchange(links, kind, group, chunks, received)
    _write(out, dtype, _combined(received, dtype, op))


def _combined(inputs: list[memoryview], dtype: str, op: str) -> np.ndarray:
    assert op == "max" or dtype != "bool", "a sum of truth values has no meaning; cast to int32"
    function = _UFUNCS[op]
    first, second, *rest = (_read(data, dtype) for data in inputs)
    total = function(first, second)
    for values in rest:
        function(total, values, out=total)
    return total


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _read(data: memoryview, dtype: str) -> np.ndarray:
    """The numbers to compute with: a view, or for 16-bit floats a float32 copy."""
    if dtype == "bfloat16":
        return bf16_to_fp32(np.frombuffer(data, np.uint16))
    if dtype == "float16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    return np.frombuffer(data, dtype)


def _write(data: memoryview, dtype: str, values: np.ndarray) -> None:
    """The opposite of `_read`, rounding to the nearest, halves to even."""
    if dtype == "bfloat16":
        np.frombuffer(data, np.uint16)[:] = fp32_to_bf16(values)
    else:
        with np.errstate(over="ignore"):  # float16: infinity, as everywhere
            np.frombuffer(data, dtype)[:] = values
