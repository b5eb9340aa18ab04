"""Saves one directory that all ranks write: under a temporary name, at once or in the background, and renamed when each
rank's files are on disk.

Ranks communicate through files, not through collectives, so that a thread can do it: each leaves a marker beside its
files, and the first rank waits for all of them. When a rank dies, the temporary directory is left as it is, and the
previous checkpoint stays the newest one.
"""

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from erniekit.checkpoint.rank_files import RankFiles, number, write_indexes
from erniekit.parallel.agree import agree, on_first
from erniekit.parallel.process_group import Group
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError, PeerError

MARKER_SECONDS = 1800.0  # the time that the other ranks have to write, once the first rank has written
_POLL_SECONDS = 0.05


class Save:
    """A directory being written.

    Args:
        name: the directory's name for messages.
        temporary: the directory's path while it is being written.
        rank_files: this rank's weight files.
        add: writes the other files into the directory, on the first rank.
        commit: gives the directory its name, on the first rank.
        group: the ranks that write.
        guard: a context that turns an OSError into a CheckpointError that says what to do.
        limit: seconds that the first rank waits for the others.
    """

    def __init__(
        self,
        name: str,
        temporary: Path,
        rank_files: Sequence[RankFiles],
        add: Callable[[Path], None],
        commit: Callable[[], None],
        group: Group,
        guard: Callable[[], AbstractContextManager[None]],
        limit: float = MARKER_SECONDS,
    ) -> None:
        self.name, self.temporary, self.rank_files = name, temporary, rank_files
        self.add, self.commit, self.group, self.guard, self.limit = add, commit, group, guard, limit
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write synchronously. An error of any rank is raised on every rank."""
        self._begin()
        self._write_all()
        self.settle()

    def start(self) -> None:
        """Copy the tensors and write them in the background. `settle` must be called later."""
        began = time.monotonic()
        self._begin()
        num_bytes = sum(files.copy() for files in self.rank_files)
        seconds = time.monotonic() - began
        log.info(f"{self.name}: {num_bytes / 2**20:.0f} MiB copied in {seconds:.2f} s; written in the background")
        # Not a daemon thread: a process that ends, even with an error, finishes the checkpoint first.
        self._thread = threading.Thread(target=self._write_in_background, name=self.name)
        self._thread.start()

    def settle(self) -> None:
        """Wait until all files are written. All ranks call it; an error of any rank is raised on every rank."""
        self.join()
        if self._error is not None and not isinstance(self._error, (CheckpointError, OSError)):
            raise self._error  # a defect, or a lost rank: the ranks cannot communicate
        agree(self._error, self.group)

    def join(self) -> None:
        """Wait until this rank has written, without communication."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self) -> None:
        def make() -> None:
            with self.guard():
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()  # no parents are created, so that a removed output directory is an error

        on_first(self.group, make)
        number(self.rank_files, self.group)

    def _write_in_background(self) -> None:
        began = time.monotonic()
        self._write_all()
        if self._error is not None:
            log.warning(f"{self.name} was not saved: {self._error}")
        elif self.group.index == 0:
            log.info(f"{self.name} is complete, {time.monotonic() - began:.1f} s later")

    def _write_all(self) -> None:
        first = self.group.index == 0
        try:
            with self.guard():
                written = [files.write(self.temporary) for files in self.rank_files]
                if first:
                    write_indexes(self.temporary, written + self._others())
                    self.add(self.temporary)
                    self.commit()
                else:
                    self._report({"written": written})
        except Exception as error:
            is_of_disk = isinstance(error, (CheckpointError, OSError))
            if first:
                self._error = error
                shutil.rmtree(self.temporary, ignore_errors=True)
            elif not is_of_disk or self.temporary.is_dir():
                self._error = error
                self._report_failure(error)
            # else: the first rank failed and removed the directory; `settle` raises its error
            if is_of_disk:
                for files in self.rank_files:  # the other ranks still need this one to gather tensors
                    files.drain()
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _report(self, content: dict[str, Any]) -> None:
        atomic.write_json(_marker(self.temporary, self.group.index), content)

    def _report_failure(self, error: Exception) -> None:
        try:
            self._report({"error": f"rank {self.group.ranks[self.group.index]}: {error}"})
        except OSError as again:  # the same full disk: the first rank will notice that this one is missing
            log.warning(f"{self.name}: the failure could not be reported to the first rank: {again}")

    def _others(self) -> list[dict[str, Any]]:
        """The reports of the other ranks, once all have written."""
        deadline = time.monotonic() + self.limit
        waiting = set(range(1, self.group.size))
        written: dict[int, list[dict[str, Any]]] = {}
        while waiting:
            for index in sorted(waiting):
                marker = _marker(self.temporary, index)
                if marker.exists():
                    content = json.loads(marker.read_text(encoding="utf-8"))
                    if "error" in content:
                        raise PeerError(content["error"])
                    written[index] = content["written"]
                    marker.unlink()
                    waiting.discard(index)
            if waiting and not self.temporary.is_dir():
                raise FileNotFoundError(errno.ENOENT, "removed while it was being written", str(self.temporary))
            if waiting and time.monotonic() > deadline:
                missing = ", ".join(str(self.group.ranks[index]) for index in sorted(waiting))
                raise CheckpointError(
                    f"{self.name}: rank {missing} did not write its files within {self.limit:.0f} s; the checkpoint is "
                    "left out. Look at the logs of these ranks, and at the disk under output_dir."
                )
            if waiting:
                time.sleep(_POLL_SECONDS)
        return [report for index in sorted(written) for report in written[index]]


def _marker(directory: Path, index: int) -> Path:
    return directory / f".written-{index}"
