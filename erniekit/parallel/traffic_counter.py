"""Counts the bytes that this rank sends, and says what each collective sends."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Counts the bytes that this rank sends, by kind of operation."""

    sent: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count bytes that are being sent."""
        self.sent[kind] += num_bytes

    def take(self) -> dict[str, int]:
        """The bytes counted since the last call; counting starts at 0 again."""
        taken = dict(self.sent)
        self.sent.clear()
        return taken


# What ring and pairwise algorithms send, which is the least possible (Thakur et al. 2005, "Optimization of collective
# communication operations in MPICH"). A broadcast sends the tensor at its source, an all-to-all the rows for other
# ranks, a send the tensor.


def all_reduce_bytes(num_bytes: int, num_ranks: int) -> int:
    """2 (n-1)/n of the tensor."""
    return 2 * (num_ranks - 1) * num_bytes // num_ranks


def reduce_scatter_bytes(num_bytes: int, num_ranks: int) -> int:
    """(n-1)/n of the tensor that each rank puts in."""
    return (num_ranks - 1) * num_bytes // num_ranks


def all_gather_bytes(num_bytes: int, num_ranks: int) -> int:
    """n-1 times the tensor that each rank puts in."""
    return (num_ranks - 1) * num_bytes
