"""Weight files that several ranks write into one directory: what one of them adds, and the index of all."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from erniekit.checkpoint.safetensors_header import INDEX_FILE, Plan
from erniekit.checkpoint.safetensors_write import Writer, plan_shards, write_index
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group

# What a rank tells of the files that it wrote: {"directory": ..., "bytes": ..., "files": {tensor: file}}.
Written = dict


@dataclass
class RankFiles:
    """One rank's share of the weight files of `directory` (below that of the checkpoint; "": itself).

    plan: the tensors of its files. tensors: (name, array), taken one at a time and by all ranks together, for they may
    be put together on the way; None where another rank writes it. encode: the plan's entries that one of them makes.
    numbered: as in Writer; None: there are no others.
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

    def hold(self) -> int:
        """Take all tensors now and keep them until they are written. Bytes of memory that this needs."""
        held = deque(self.tensors)

        def release() -> Iterator[tuple[str, np.ndarray | None]]:
            while held:
                yield held.popleft()

        num_bytes = sum(array.nbytes for _, array in held if array is not None)
        self.tensors = release()
        return num_bytes

    def drain(self) -> None:
        """Take what is left, for the ranks that take it with this one."""
        deque(self.tensors, maxlen=0)


def number(portions: Sequence[RankFiles], group: Group) -> None:
    """Number the files over all ranks, in their order. All ranks call it with portions of the same directories."""
    if group.size == 1:
        return
    counts = comm.gather_objects([len(plan_shards(p.plan, p.max_shard_size)) if p.plan else 0 for p in portions], group)
    for i, portion in enumerate(portions):
        of_rank = [count[i] for count in counts]
        portion.numbered = (sum(of_rank[: group.index]), sum(of_rank))


def write_indexes(root: Path, written: Iterable[Written]) -> None:
    """Add the index to each directory in which several files were written."""
    maps: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for part in written:
        files = maps.setdefault(part["directory"], {})
        twice = files.keys() & part["files"].keys()
        assert not twice, f"written by two ranks: {sorted(twice)[:3]}"
        files |= part["files"]
        sizes[part["directory"]] = sizes.get(part["directory"], 0) + part["bytes"]
    for directory, files in maps.items():
        if len(set(files.values())) > 1:
            write_index(root / directory / INDEX_FILE, files, sizes[directory])
