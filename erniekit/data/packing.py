"""Which documents share a row. Pure functions of the documents' lengths.

A window of documents is packed at a time. pack(lengths, capacity, last) -> (rows, carried): each row lists indices into
`lengths`, in rising order, that together have at most `capacity` tokens; `carried` are those left for the next window,
which begins with them. With `last` nothing is carried. Every index is in exactly one row or carried.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

Packed = tuple[list[list[int]], list[int]]
Packer = Callable[[Sequence[int], int, bool], Packed]


def no_packing(lengths: Sequence[int], capacity: int, last: bool) -> Packed:
    """A row for each document."""
    return [[i] for i in range(len(lengths))], []


def sequential(lengths: Sequence[int], capacity: int, last: bool) -> Packed:
    """In order: a row takes documents until the next one does not fit. The open row is carried, so the size of the
    window does not matter.
    """
    rows: list[list[int]] = []
    free = -1
    for i, length in enumerate(lengths):
        if length > free:
            rows.append([])
            free = capacity
        rows[-1].append(i)
        free -= length
    carried = [] if last or not rows else rows.pop()
    return rows, carried


def greedy(lengths: Sequence[int], capacity: int, last: bool) -> Packed:
    """Best fit decreasing (Johnson 1974, at most 11/9 of the fewest rows): the longest document first, each into the
    fullest row it fits.

    O(n log n) comparisons. The emptiest row is carried, so that a window does not end with a row half full. Rows come
    in the order of their longest documents in the window, so that rows of long and of short documents stay mixed.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(spaces, (lengths[i], -1))
        if at < len(spaces):
            free, row = spaces.pop(at)
            rows[row].append(i)
        else:
            free, row = capacity, len(rows)
            rows.append([i])
        if free > lengths[i]:
            insort(spaces, (free - lengths[i], row))
    carried: list[int] = []
    if not last and spaces:
        carried = rows[spaces[-1][1]]
        rows[spaces[-1][1]] = []
    filled = sorted((row for row in rows if row), key=lambda row: row[0])
    return [sorted(row) for row in filled], sorted(carried)
