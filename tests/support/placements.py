"""Parameters and placements for tests of what is arithmetic on them: this process is rank 0 of every group."""

from erniekit.parallel.buckets import Entry
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import Group


def placement(shard: int = 1, replica: int = 1, partial: int = 1, ends: int = 1, copies: int = 1) -> Placement:
    """A placement with groups of these sizes."""
    gradient, *others = (Group(tuple(range(size)), 0) for size in (shard * replica, shard, replica, partial, ends))
    return Placement(gradient, *others, copies)


def entry(name: str, size: int, where: Placement, dtype: str = "float32", model_chunk: int = 0) -> Entry:
    """A parameter of one axis."""
    return Entry(name, (size,), dtype, where, model_chunk)
