"""Training checkpoints, which are complete or absent.

`checkpoint-N/` is written under a temporary name by all ranks, synced to disk and renamed by the first one. A process
that is killed at any moment leaves either the old set of checkpoints or the new one, and at most a temporary directory
that the next run removes.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from erniekit.checkpoint.model_dir import checkpoint_dir, list_checkpoints, move_staged, staging_of, where_it_resumes
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.save_job import Save
from erniekit.parallel.agree import on_first
from erniekit.parallel.process_group import Group
from erniekit.utils import atomic, log
from erniekit.utils.directory_lock import is_being_written
from erniekit.utils.errors import CheckpointError, disk_is_full

ABANDONED = "abandoned-"  # directories of checkpoints that a run abandoned when it resumed from an earlier one


@contextlib.contextmanager
def disk_errors(what: str, where: Path, unharmed: str, command: Callable[[], str]) -> Iterator[None]:
    """Turn an operating-system error during a write into a message that also says what is still intact (`unharmed`, a
    sentence with a space, or nothing). `command`: the command that resumes, as text.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        if not where.is_dir():
            raise removed(what, where, command()) from error
        cause = (
            error.__cause__ if isinstance(error, CheckpointError) else error
        )  # the writer of weights has its own message
        if not isinstance(cause, OSError):
            raise
        full = disk_is_full(cause)
        reason = "the disk is full" if full else str(cause)
        free = shutil.disk_usage(where).free
        hint = f"Free some space ({free / 1e6:,.1f} MB are left)" if full else "Fix this"
        raise CheckpointError(
            f"{what} could not be written to {where}: {reason}. {unharmed}{hint} and run {command()} again; "
            f"{where_it_resumes(where)}."
        ) from error


def removed(what: str, output_dir: Path, command: str) -> CheckpointError:
    """The error of a run whose output directory no longer exists."""
    return CheckpointError(
        f"output_dir: {output_dir} was removed or renamed during the run: {what} cannot be written "
        f"there. Put the directory back and run {command} again."
    )


class CheckpointManager:
    """The checkpoints of one output directory, which all ranks of `group` share. `command`: the command that resumes
    from them, in the words of messages.
    """

    def __init__(
        self,
        output_dir: Path,
        limit: int | None,
        group: Group | None = None,
        command: Callable[[], str] = lambda: "the same command",
    ) -> None:
        self.output_dir, self.command = output_dir, command
        self.limit = limit
        self.group = group or Group((0,), 0)
        self._running: Save | None = None

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written or half deleted, but not what an export is writing."""
        for name in atomic.remove_leftovers(self.output_dir, in_use=is_being_written):
            log.info(f"{self.output_dir}: removed {name}, which a killed process left behind")

    def new_aside(self) -> Path:
        """A new directory for the checkpoints that the run abandons."""
        numbers = [path.name.removeprefix(ABANDONED) for path in self.output_dir.glob(f"{ABANDONED}*")]
        aside = self.output_dir / f"{ABANDONED}{1 + max((int(n) for n in numbers if n.isdigit()), default=0)}"
        aside.mkdir()
        return aside

    def set_aside(self, checkpoints: Sequence[Path], aside: Path) -> None:
        """Move checkpoints, newest first, into a directory below the output directory. They stay complete but no longer
        count: neither as the newest, nor for save_total_limit.
        """
        for path in reversed(checkpoints):
            if path.is_symlink():  # a relative link would point elsewhere after the move
                (aside / path.name).symlink_to(path.resolve(), target_is_directory=True)
                path.unlink()
            else:
                path.rename(aside / path.name)
        atomic.sync_directory(aside)
        atomic.sync_directory(self.output_dir)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        checkpoints = list_checkpoints(self.output_dir)
        return checkpoints[-1] if checkpoints else None

    def save(
        self,
        step: int,
        add: Callable[[Path], None],
        files: Sequence[RankFiles] = (),
        keep: Path | None = None,
        background: bool = False,
    ) -> Path:
        """Write checkpoint-`step`: this rank's `files`, and on the first rank what add(temporary directory) writes;
        then prune, with `keep` as there. With `background`, `wait` raises the errors.

        All ranks call it. Raises CheckpointError when the disk rejects the data, also for the previous save, if that
        was still being written; earlier checkpoints stay.
        """
        self.wait()
        target = checkpoint_dir(self.output_dir, step)
        temporary = atomic.shared_temporary(target)
        newest = self.newest()
        unharmed = f"{newest.name} is unharmed. " if newest else ""

        def commit() -> None:
            atomic.sync_tree(temporary)
            atomic.replace_tree(temporary, target)
            self.prune(keep)

        guard = functools.partial(disk_errors, target.name, self.output_dir, unharmed, self.command)
        save = Save(target.name, temporary, files, add, commit, self.group, guard)
        if background:
            self._running = save
            save.start()
        else:
            save.run()
        return target

    def save_into(self, target: Path, add: Callable[[Path], None], files: Sequence[RankFiles]) -> None:
        """Write into a directory that may contain other files, as `save` does: its files are replaced one by one once
        all are on disk.
        """
        self.wait()
        staging = Path(on_first(self.group, lambda: str(staging_of(target))))
        unharmed = "The checkpoints are unharmed. " if self.newest() else ""
        guard = functools.partial(disk_errors, target.name, self.output_dir, unharmed, self.command)

        def commit() -> None:
            if not self.output_dir.is_dir():  # otherwise a directory with the model alone would be created in its place
                raise removed("the final model", self.output_dir, self.command())
            move_staged(staging, target)
            shutil.rmtree(staging, ignore_errors=True)

        Save(target.name, staging, files, add, commit, self.group, guard).run()

    def wait(self) -> None:
        """Wait for a save in the background and raise its error, if any, on every rank. All ranks call it."""
        if self._running is not None:
            running, self._running = self._running, None
            running.settle()

    def join(self) -> None:
        """Wait for a save in the background without communication or errors, for a run that ends by an error."""
        if self._running is not None:
            self._running.join()

    def prune(self, keep: Path | None) -> None:
        """Remove the oldest checkpoints beyond the limit; `keep` (the best one) stays and counts."""
        if self.limit is None:
            return
        checkpoints = list_checkpoints(self.output_dir)
        removable = [path for path in checkpoints[:-1] if path != keep]
        for path in removable[: max(0, len(checkpoints) - self.limit)]:
            try:
                atomic.remove_tree(path)
            except OSError as error:  # the new checkpoint is complete, and the run continues
                log.warning(f"save_total_limit: {path} cannot be removed ({error.strerror}); it stays")
