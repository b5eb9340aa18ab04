"""Rows sorted by group, such as tokens by expert, as one span for each group."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each group's rows, which follow one another; `counts` are the groups' numbers of rows."""
    return list(pairwise(accumulate(counts, initial=0)))
