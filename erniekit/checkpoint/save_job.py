"""One directory that all ranks write: under a temporary name, at once or beside the training, renamed when each rank's
files are on disk.

Ranks tell one another through files, not through collectives, so that a thread can do it: each leaves a marker beside
what it wrote, and the first rank waits for all of them. A rank that dies leaves the temporary directory as it is: what
was there before stays the newest checkpoint.
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
from erniekit.utils.errors import CheckpointError

MARKER_SECONDS = 1800.0  # the others' time to write, once the first rank has written its own part
_POLL_SECONDS = 0.05


class Save:
    """A directory being written.

    Args:
        name: of the directory, for messages.
        temporary: where it is written.
        portions: this rank's weight files.
        add: the first rank writes into the directory what else belongs there.
        commit: the first rank gives the directory its name.
        group: the ranks that write.
        guard: a context that turns an OSError into a CheckpointError that says what to do.
        limit: seconds that the first rank waits for the others.
    """

    def __init__(
        self,
        name: str,
        temporary: Path,
        portions: Sequence[RankFiles],
        add: Callable[[Path], None],
        commit: Callable[[], None],
        group: Group,
        guard: Callable[[], AbstractContextManager[None]],
        limit: float = MARKER_SECONDS,
    ) -> None:
        self.name, self.temporary, self.portions = name, temporary, portions
        self.add, self.commit, self.group, self.guard, self.limit = add, commit, group, guard, limit
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Write now. Raises on every rank what went wrong on any."""
        self._begin()
        self._write_all()
        self.settle()

    def start(self) -> None:
        """Copy what is to be written, and write it beside what follows; `settle` has to be called."""
        began = time.monotonic()
        self._begin()
        held = sum(portion.hold() for portion in self.portions)
        log.info(
            f"{self.name}: {held / 2**20:.0f} MiB copied in {time.monotonic() - began:.2f} s; written in the background"
        )
        # No daemon: a process that ends, even by an error, finishes the checkpoint first.
        self._thread = threading.Thread(target=self._write_beside, name=self.name)
        self._thread.start()

    def settle(self) -> None:
        """Wait until it is written. All ranks call it; raises on every rank what went wrong on any."""
        self.join()
        if self._error is not None and not isinstance(self._error, (CheckpointError, OSError)):
            raise self._error  # a defect, or a rank is lost: the others cannot be asked
        agree(self._error, self.group)

    def join(self) -> None:
        """Wait until this rank has written, and ask nobody."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self) -> None:
        def make() -> None:
            with self.guard():
                shutil.rmtree(self.temporary, ignore_errors=True)
                self.temporary.mkdir()  # without parents: an output directory that was removed is an error

        on_first(self.group, make)
        number(self.portions, self.group)

    def _write_beside(self) -> None:
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
                written = [portion.write(self.temporary) for portion in self.portions]
                if first:
                    write_indexes(self.temporary, written + self._others())
                    self.add(self.temporary)
                    self.commit()
                else:
                    self._tell({"written": written})
        except Exception as error:
            self._error = error
            if first:
                shutil.rmtree(self.temporary, ignore_errors=True)
            else:
                self._tell_failure(error)
            if isinstance(error, (CheckpointError, OSError)):
                for portion in self.portions:  # the other ranks still need this one to put tensors together
                    portion.drain()
        except BaseException:
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _tell(self, content: dict[str, Any]) -> None:
        atomic.write_json(_marker(self.temporary, self.group.index), content)

    def _tell_failure(self, error: Exception) -> None:
        try:
            self._tell({"error": f"rank {self.group.ranks[self.group.index]}: {error}"})
        except OSError as again:  # the same full disk: the first rank will miss this one
            log.warning(f"{self.name}: the first rank could not be told of the failure: {again}")

    def _others(self) -> list[dict[str, Any]]:
        """What the other ranks have written, once all have."""
        deadline = time.monotonic() + self.limit
        waiting = set(range(1, self.group.size))
        written: dict[int, list[dict[str, Any]]] = {}
        while waiting:
            for index in sorted(waiting):
                marker = _marker(self.temporary, index)
                if marker.exists():
                    content = json.loads(marker.read_text(encoding="utf-8"))
                    if "error" in content:
                        raise CheckpointError(content["error"])
                    written[index] = content["written"]
                    marker.unlink()
                    waiting.discard(index)
            if waiting and not self.temporary.is_dir():
                raise FileNotFoundError(errno.ENOENT, "removed while it was being written", str(self.temporary))
            if waiting and time.monotonic() > deadline:
                missing = ", ".join(str(self.group.ranks[index]) for index in sorted(waiting))
                raise CheckpointError(
                    f"{self.name}: rank {missing} did not write its part within {self.limit:.0f} s; the checkpoint is "
                    "left out. Look at what these ranks say, and at the disk under output_dir."
                )
            if waiting:
                time.sleep(_POLL_SECONDS)
        return [part for index in sorted(written) for part in written[index]]


def _marker(directory: Path, index: int) -> Path:
    return directory / f".written-{index}"
