"""What the ranks of a run decide together: one acts, all succeed, or all fail with the same words."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit.parallel import comm
from erniekit.parallel.process_group import Group
from erniekit.utils.errors import CheckpointError, UserError

# Attributes of a directory may be cached on a network file system (NFS: up to 60 s; new files are asked for sooner).
_VISIBLE_SECONDS = 10.0


def agree(error: Exception | None, group: Group) -> None:
    """Raise this rank's error, or else a CheckpointError with that of another. All ranks call it."""
    said = comm.gather_objects(None if error is None else str(error) or type(error).__name__, group)
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise CheckpointError(text if text.startswith("rank ") else f"rank {group.ranks[rank]}: {text}")


@contextmanager
def all_or_none(group: Group) -> Iterator[None]:
    """A block that each rank runs by itself (nothing in it may wait for other ranks): an error of one is one of all."""
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

    def leave_sign() -> str:
        sign = directory / f".shared-{time.time_ns()}"
        sign.touch()
        return sign.name

    sign = directory / on_first(group, leave_sign)
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (seen := sign.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [group.ranks[i] for i, visible in enumerate(comm.gather_objects(seen, group)) if not visible]
    on_first(group, lambda: sign.unlink())
    if blind:
        raise CheckpointError(
            f"output_dir: {directory} of rank {group.ranks[0]} is not seen by rank {', '.join(map(str, blind))}: every "
            "rank writes its part of a checkpoint there. Choose a directory that all hosts share (NFS, Lustre, ...), "
            "under the same path."
        )
