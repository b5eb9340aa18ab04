"""The processes of a job, and groups of them that communicate."""

from dataclasses import dataclass
from typing import Any

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of ranks, and the "host:port" at which each rank is reached."""

    rank: int
    size: int
    endpoints: tuple[str, ...]

    def name(self, rank: int) -> str:
        """The name of a rank in messages."""
        return f"rank {rank} ({self.endpoints[rank]})"


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. `index`: the position of this rank in `ranks`, -1 if it is not one of them; `handle`:
    NCCL's group, None over TCP and in a group of one.
    """

    ranks: Ranks
    index: int
    handle: Any = None

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    def others(self) -> list[int]:
        """The positions of the other ranks, beginning after this one, so that not all send to one rank at once."""
        return [(self.index + step) % self.size for step in range(1, self.size)]


ALONE = Group((0,), 0)
