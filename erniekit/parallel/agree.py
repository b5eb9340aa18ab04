"""Run something on one rank or on all; if any rank fails, every rank raises the same error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit.parallel import comm
from erniekit.parallel.process_group import Group
from erniekit.utils.errors import CheckpointError, PeerError, UserError

# A network file system may cache attributes of a directory (NFS: up to 60 s); new files are usually visible sooner.
_VISIBLE_SECONDS = 10.0


def agree(error: Exception | None, group: Group) -> None:
    """Raise this rank's error, or else a PeerError with that of another. All ranks call it."""
    messages = comm.gather_objects(None if error is None else str(error) or type(error).__name__, group)
    if error is not None:
        raise error
    for rank, text in enumerate(messages):
        if text is not None:
            raise PeerError(text if text.startswith("rank ") else f"rank {group.ranks[rank]}: {text}")


@contextmanager
def all_or_none(group: Group) -> Iterator[None]:
    """Run a block on each rank (nothing in it may wait for other ranks); if it fails on one, every rank raises."""
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    agree(error, group)


def on_first(group: Group, act: Callable[[], Any]) -> Any:
    """The first rank of the group calls `act`; every rank gets its result (of JSON's types), or raises its error."""
    result = None
    with all_or_none(group):
        if group.index == 0:
            result = act()
    return comm.gather_objects(result, group)[0]


def require_shared(directory: Path, group: Group) -> None:
    """Raises CheckpointError on every rank if `directory` is not the same one for all of them."""
    if group.size == 1:
        return

    def make_marker() -> str:
        marker = directory / f".shared-{time.time_ns()}"
        marker.touch()
        return marker.name

    marker = directory / on_first(group, make_marker)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (visible := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everywhere = comm.gather_objects(visible, group)
    without = [group.ranks[i] for i, is_visible in enumerate(everywhere) if not is_visible]
    on_first(group, lambda: marker.unlink())
    if without:
        raise CheckpointError(
            f"output_dir: {directory} of rank {group.ranks[0]} is not visible to "
            f"rank {', '.join(map(str, without))}: "
            "every rank writes its shards of a checkpoint there. Choose a directory that all hosts share (NFS, "
            "Lustre, ...), under the same path."
        )
