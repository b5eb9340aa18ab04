"""Training checkpoints: a directory is whole or it is not there.

`checkpoint-N/` is written under a temporary name by all ranks, forced to disk and renamed by the first one. A process
killed at any moment leaves either the old set of checkpoints or the new one, plus at most a temporary directory that
the next run removes.
"""

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from erniekit.checkpoint.model_dir import checkpoint_dir, list_checkpoints, move_staged, staging_of
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.save_job import Save
from erniekit.parallel.agree import on_first
from erniekit.parallel.process_group import Group
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError

ABANDONED = "abandoned-"  # directories of checkpoints that a run set aside when it went back before them


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
    except (OSError, CheckpointError) as error:
        if not where.is_dir():
            raise removed(what, where) from error
        cause = (
            error.__cause__ if isinstance(error, CheckpointError) else error
        )  # the writer of weights has its own words
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(cause)
        free = shutil.disk_usage(where).free
        hint = f"Free some space ({free / 1e6:,.1f} MB are left)" if full else "Mend that"
        raise CheckpointError(
            f"{what} could not be written to {where}: {reason}. {kept} {hint} and run the same command again: it "
            "goes on from the newest checkpoint."
        ) from error


def removed(what: str, output_dir: Path) -> CheckpointError:
    """For a run whose output directory is no longer there."""
    return CheckpointError(
        f"output_dir: {output_dir} was removed or renamed while the run was going on: {what} cannot be written "
        "there. Put the directory back and run the same command again."
    )


class CheckpointManager:
    """The checkpoints of one output directory, which all ranks of `group` share."""

    def __init__(self, output_dir: Path, limit: int | None, group: Group | None = None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self.group = group or Group((0,), 0)
        self._running: Save | None = None

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written or half deleted."""
        for name in atomic.remove_leftovers(self.output_dir):
            log.info(f"{self.output_dir}: removed {name}, which a killed process left behind")

    def new_aside(self) -> Path:
        """A new directory for what the run sets aside."""
        numbers = [path.name.removeprefix(ABANDONED) for path in self.output_dir.glob(f"{ABANDONED}*")]
        aside = self.output_dir / f"{ABANDONED}{1 + max((int(n) for n in numbers if n.isdigit()), default=0)}"
        aside.mkdir()
        return aside

    def set_aside(self, checkpoints: Sequence[Path], aside: Path) -> None:
        """Move checkpoints, newest first, into a directory below the output directory, where they are still whole but
        no longer count: neither as the newest, nor for save_total_limit.
        """
        for path in reversed(checkpoints):
            if path.is_symlink():  # a relative link would lead elsewhere from there
                (aside / path.name).symlink_to(path.resolve(), target_is_directory=True)
                path.unlink()
            else:
                path.rename(aside / path.name)
        atomic.sync_directory(aside)
        atomic.sync_directory(self.output_dir)

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = list_checkpoints(self.output_dir)
        return found[-1] if found else None

    def save(
        self,
        step: int,
        add: Callable[[Path], None],
        portions: Sequence[RankFiles] = (),
        keep: Path | None = None,
        background: bool = False,
    ) -> Path:
        """Write checkpoint-`step`: this rank's `portions`, and on the first rank what add(temporary directory) writes;
        then prune, with `keep` as there. In the background, `wait` tells how it went.

        All ranks call it. Raises CheckpointError when the disk refuses, also for the save before, if that was still
        being written; earlier checkpoints stay.
        """
        self.wait()
        target = checkpoint_dir(self.output_dir, step)
        temporary = atomic.shared_temporary(target)
        newest = self.newest()
        kept = f"{newest.name} is unharmed." if newest else "There is no earlier checkpoint."

        def commit() -> None:
            sync_tree(temporary)
            atomic.replace_tree(temporary, target)
            self.prune(keep)

        guard = functools.partial(disk_errors, target.name, self.output_dir, kept)
        save = Save(target.name, temporary, portions, add, commit, self.group, guard)
        if background:
            self._running = save
            save.start()
        else:
            save.run()
        return target

    def save_into(self, target: Path, add: Callable[[Path], None], portions: Sequence[RankFiles]) -> None:
        """Write into a directory that may hold other files, as `save` does: its files are replaced one by one once all
        are on disk.
        """
        self.wait()
        staging = Path(on_first(self.group, lambda: str(staging_of(target))))
        guard = functools.partial(disk_errors, target.name, self.output_dir, "The checkpoints are unharmed.")

        def commit() -> None:
            if not self.output_dir.is_dir():  # the model alone, without the run, would appear in its place
                raise removed("the final model", self.output_dir)
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
            atomic.remove_tree(path)
