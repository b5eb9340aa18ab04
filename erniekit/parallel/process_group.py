"""Which process this is among all, and lists of processes that talk to one another."""

from dataclasses import dataclass
from typing import Any

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Who this process is: `rank` of `size`, and every rank's "host:port" under which the others reach it."""

    rank: int
    size: int
    endpoints: tuple[str, ...]

    def name(self, rank: int) -> str:
        """A rank as messages name it."""
        return f"rank {rank} ({self.endpoints[rank]})"


@dataclass(frozen=True)
class Group:
    """Ranks that talk to one another. `index`: the place of this rank among `ranks`, -1 if it is not one of them;
    `handle`: NCCL's group, None over TCP and where there is nobody to talk to.
    """

    ranks: Ranks
    index: int
    handle: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def others(self) -> list[int]:
        """Places of the other ranks, this rank's successor first, so that not all turn to the same one at a time."""
        return [(self.index + step) % self.size for step in range(1, self.size)]


ALONE = Group((0,), 0)
