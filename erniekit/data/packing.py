"""Decides which documents share a row, by pure functions of the documents' lengths.

Documents are packed in windows. pack(lengths, capacity, last) -> (rows, carried): each row is an ascending list of
indices into `lengths` with at most `capacity` tokens in total. The documents in `carried` are left for the next window,
which begins with them; with `last` there are none. Every index is in exactly one row or in `carried`.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

Packed = tuple[list[list[int]], list[int]]
Packer = Callable[[Sequence[int], int, bool], Packed]


def no_packing(lengths: Sequence[int], capacity: int, last: bool) -> Packed:
    """Puts every document into a row of its own."""
    return [[i] for i in range(len(lengths))], []


def sequential(lengths: Sequence[int], capacity: int, last: bool) -> Packed:
    """Fills rows in order: a row ends when the next document does not fit. The open row is carried, so the result does
    not depend on the size of the window.
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
    """Best fit decreasing (Johnson 1974, at most 11/9 of the optimal number of rows): documents are placed from the
    longest to the shortest, each into the fullest row that has room for it.

    It needs O(n log n) comparisons. The emptiest row is carried, so that a window does not end with a half-full row.
    Rows are in the order of the positions of their longest documents in the window, so that rows of long and of short
    documents stay mixed.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # equal ones keep their order
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
