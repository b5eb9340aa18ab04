"""Collectives over TCP links, on the bytes of tensors; a dtype is named as Paddle and numpy name it.

Sums and maxima are taken in the group's order, so every rank gets the same bits; 16-bit floats are summed in float32
and rounded once.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from erniekit.parallel.process_group import Group
from erniekit.parallel.tcp_transport import Links
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16
from erniekit.utils.spans import spans

# Up to this many bytes an all-reduce sends its tensor whole to everyone: one round of messages instead of two.
WHOLE_BYTES = 32 << 10
_UFUNCS = {"sum": np.add, "max": np.maximum}


def cut(data: memoryview, counts: Sequence[int], unit_bytes: int) -> list[memoryview]:
    """Consecutive spans of counts[i] units."""
    return [data[start * unit_bytes : end * unit_bytes] for start, end in spans(counts)]


def exchange(
    links: Links, kind: str, group: Group, outgoing: Sequence[memoryview], incoming: Sequence[memoryview]
) -> None:
    """outgoing[i] goes to rank i of the group, incoming[i] comes from it. This rank's own entries are left alone, and
    empty ones are not sent: both sides know their lengths.
    """
    others = group.others()
    links.exchange(
        kind,
        [(group.ranks[i], outgoing[i]) for i in others if len(outgoing[i])],
        [(group.ranks[i], incoming[i]) for i in reversed(others) if len(incoming[i])],
    )


def gather(links: Links, kind: str, group: Group, data: memoryview, out: memoryview) -> None:
    """`out` is every rank's `data`, all of one length, one after the other."""
    parts = cut(out, [1] * group.size, len(data))
    parts[group.index][:] = data
    exchange(links, kind, group, [data] * group.size, parts)


def all_reduce(links: Links, group: Group, data: memoryview, dtype: str, op: str) -> None:
    """`data` becomes the sum or the maximum over the group."""
    if len(data) <= WHOLE_BYTES:
        rows = np.empty(group.size * len(data), np.uint8).data
        gather(links, "all_reduce", group, data, rows)
        _write(data, dtype, _combined(cut(rows, [1] * group.size, len(data)), dtype, op))
        return
    item_bytes = _item_bytes(dtype)
    bounds = [part * (len(data) // item_bytes) // group.size for part in range(group.size + 1)]
    parts = cut(data, [end - start for start, end in pairwise(bounds)], item_bytes)
    _reduce_parts(links, "all_reduce", group, parts, parts[group.index], dtype, op)
    exchange(links, "all_reduce", group, [parts[group.index]] * group.size, parts)


def reduce_scatter(links: Links, group: Group, data: memoryview, out: memoryview, dtype: str) -> None:
    """`out` becomes this rank's of `size` equal parts of the sum of `data`."""
    _reduce_parts(links, "reduce_scatter", group, cut(data, [1] * group.size, len(out)), out, dtype, "sum")


def _reduce_parts(
    links: Links, kind: str, group: Group, parts: list[memoryview], out: memoryview, dtype: str, op: str
) -> None:
    """`out` becomes the combination of every rank's parts[index of this rank]."""
    own = parts[group.index]
    pieces = [own if i == group.index else np.empty(len(own), np.uint8).data for i in range(group.size)]
    exchange(links, kind, group, parts, pieces)
    _write(out, dtype, _combined(pieces, dtype, op))


def _combined(pieces: list[memoryview], dtype: str, op: str) -> np.ndarray:
    assert op == "max" or dtype != "bool", "a sum of truth values has no meaning; cast to int32"
    function = _UFUNCS[op]
    first, second, *rest = (_read(piece, dtype) for piece in pieces)
    total = function(first, second)
    for piece in rest:
        function(total, piece, out=total)
    return total


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _read(data: memoryview, dtype: str) -> np.ndarray:
    """Numbers to calculate with: a view, for 16-bit floats float32."""
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
