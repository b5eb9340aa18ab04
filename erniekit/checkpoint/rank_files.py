"""Weight files that several ranks write into one directory: the files of each rank, and the index of all."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from erniekit.checkpoint.safetensors_header import INDEX_FILE, Plan
from erniekit.checkpoint.safetensors_write import Writer, plan_shards, write_index
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group

# A rank's report of the files that it wrote: {"directory": ..., "bytes": ..., "files": {tensor: file}}.
Written = dict


@dataclass
class RankFiles:
    """The weight files of one rank in `directory` (below that of the checkpoint; "" for the checkpoint itself).

    Attributes:
        plan: the tensors of its files.
        tensors: (name, array), iterated by all ranks together, because a tensor may be gathered from its shards; the
            array is None where another rank writes it.
        encode: converts one of them to the plan's entries.
        numbered: as in Writer; None where no other rank writes into the directory.
    """

    directory: str
    plan: Plan
    tensors: Iterator[tuple[str, np.ndarray | None]]
    encode: Callable[[str, np.ndarray], Iterable[tuple[str, np.ndarray]]]
    metadata: Mapping[str, str]
    max_shard_size: int | str = "5GB"
    numbered: tuple[int, int] | None = None

    def write(self, root: Path) -> Written:
        """Write the files, on disk when this returns."""
        if not self.plan:
            self.drain()
            return {"directory": self.directory, "bytes": 0, "files": {}}
        with Writer(root / self.directory, self.plan, self.max_shard_size, self.metadata, self.numbered) as writer:
            for name, array in self.tensors:
                if array is not None:
                    for key, stored in self.encode(name, array):
                        writer.write(key, stored)
        return {"directory": self.directory, "bytes": writer.num_bytes, "files": writer.weight_map}

    def copy(self) -> int:
        """Copy all tensors now and keep the copies until they are written. Returns their bytes."""
        copies = deque(self.tensors)

        def release() -> Iterator[tuple[str, np.ndarray | None]]:
            while copies:
                yield copies.popleft()

        num_bytes = sum(array.nbytes for _, array in copies if array is not None)
        self.tensors = release()
        return num_bytes

    def drain(self) -> None:
        """Iterate over the remaining tensors, because other ranks gather them together with this one."""
        deque(self.tensors, maxlen=0)


def number(rank_files: Sequence[RankFiles], group: Group) -> None:
    """Number the files over all ranks, in their order. All ranks call it with the same directories."""
    if group.size == 1:
        return
    counts = comm.gather_objects(
        [len(plan_shards(p.plan, p.max_shard_size)) if p.plan else 0 for p in rank_files], group
    )
    for i, files in enumerate(rank_files):
        of_rank = [count[i] for count in counts]
        files.numbered = (sum(of_rank[: group.index]), sum(of_rank))


def write_indexes(root: Path, written: Iterable[Written]) -> None:
    """Add the index to each directory in which several files were written."""
    maps: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for report in written:
        files = maps.setdefault(report["directory"], {})
        twice = files.keys() & report["files"].keys()
        assert not twice, f"written by two ranks: {sorted(twice)[:3]}"
        files |= report["files"]
        sizes[report["directory"]] = sizes.get(report["directory"], 0) + report["bytes"]
    for directory, files in maps.items():
        if len(set(files.values())) > 1:
            write_index(root / directory / INDEX_FILE, files, sizes[directory])
