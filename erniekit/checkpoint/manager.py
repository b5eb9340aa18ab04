"""Training checkpoints: a directory is whole or it is not there.

`checkpoint-N/` is written under a temporary name by all ranks, forced to disk and renamed by the first one. A process
killed at any moment leaves either the old set of checkpoints or the new one, plus at most a temporary directory that
the next run removes.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from erniekit.checkpoint.background import Save
from erniekit.checkpoint.folder import move_staged, staging_of
from erniekit.checkpoint.portion import Portion
from erniekit.checkpoint.together import on_first
from erniekit.parallel.comm import Group
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(\d+)$")
_TEMPORARY = re.compile(r"\.checkpoint-\d+(\.old)?\.tmp$")


def checkpoint_step(path: Path) -> int | None:
    """N of .../checkpoint-N, None for another name."""
    match = _NAME.match(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(checkpoint_step(p), p) for p in output_dir.iterdir() if p.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def sync_tree(directory: Path) -> None:
    """Force every file below `directory`, and the directories, to disk."""
    for root, _, files in os.walk(directory):
        for path in [*(Path(root) / name for name in files), Path(root)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def disk_errors(what: str, where: Path, kept: str) -> Iterator[None]:
    """Turn an operating-system error while writing into one message that says what is still there."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(error)
        free = shutil.disk_usage(where).free if where.is_dir() else 0
        hint = f"Free some space ({free / 1e9:.1f} GB are left)" if full else "Mend that"
        raise CheckpointError(
            f"{what} could not be written to {where}: {reason}. {kept} {hint} and run the same command again: it "
            "goes on from the newest checkpoint."
        ) from error


class CheckpointManager:
    """The checkpoints of one output directory, which all ranks of `group` share."""

    def __init__(self, output_dir: Path, limit: int | None, group: Group | None = None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self.group = group or Group((0,), 0)
        self._running: Save | None = None

    def remove_leftovers(self) -> None:
        """Delete temporary directories that a killed run left behind."""
        for path in self.output_dir.iterdir():
            if path.is_dir() and _TEMPORARY.match(path.name):
                log.info(f"removing {path.name}: a save that did not finish")
                shutil.rmtree(path)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = list_checkpoints(self.output_dir)
        return found[-1] if found else None

    def save(
        self,
        step: int,
        add: Callable[[Path], None],
        portions: Sequence[Portion] = (),
        keep: Path | None = None,
        background: bool = False,
    ) -> Path:
        """Write checkpoint-`step`: this rank's `portions`, and on the first rank what add(temporary directory) writes;
        then prune, with `keep` as there. In the background, `wait` tells how it went.

        All ranks call it. Raises CheckpointError when the disk refuses, also for the save before, if that was still
        being written; earlier checkpoints stay.
        """
        self.wait()
        target = self.output_dir / f"checkpoint-{step}"
        temporary = self.output_dir / f".checkpoint-{step}.tmp"
        newest = self.newest()
        kept = f"{newest.name} is unharmed." if newest else "There is no earlier checkpoint."

        def commit() -> None:
            sync_tree(temporary)
            _replace(temporary, target)
            self.prune(keep)

        guard = functools.partial(disk_errors, target.name, self.output_dir, kept)
        save = Save(target.name, temporary, portions, add, commit, self.group, guard)
        if background:
            self._running = save
            save.start()
        else:
            save.run()
        return target

    def save_into(self, target: Path, add: Callable[[Path], None], portions: Sequence[Portion]) -> None:
        """Write into a directory that may hold other files, as `save` does: its files are replaced one by one once all
        are on disk.
        """
        self.wait()
        staging = Path(on_first(self.group, lambda: str(staging_of(target))))
        guard = functools.partial(disk_errors, target.name, self.output_dir, "The checkpoints are unharmed.")

        def commit() -> None:
            move_staged(staging, target)
            shutil.rmtree(staging, ignore_errors=True)

        Save(target.name, staging, portions, add, commit, self.group, guard).run()

    def wait(self) -> None:
        """Wait for a save in the background; raises what went wrong with it, on every rank. All ranks call it."""
        if self._running is not None:
            running, self._running = self._running, None
            running.settle()

    def join(self) -> None:
        """Wait for a save in the background, for a run that ends by an error: ask nobody, raise nothing."""
        if self._running is not None:
            self._running.join()

    def prune(self, keep: Path | None) -> None:
        """Remove the oldest checkpoints beyond the limit; `keep` (the best one) stays and counts."""
        if self.limit is None:
            return
        found = list_checkpoints(self.output_dir)
        spare = [path for path in found[:-1] if path != keep]
        for path in spare[: max(0, len(found) - self.limit)]:
            # Renamed first, so that a kill halfway leaves no torn checkpoint under its name.
            doomed = path.with_name(f".{path.name}.tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)


def _replace(temporary: Path, target: Path) -> None:
    """Rename over an existing checkpoint of the same step, which a directory rename cannot do in one go."""
    if target.exists():
        old = target.with_name(f".{target.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
