"""Trainable parameters whose optimizer state is divided over ranks (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054):
which chunk of each parameter this rank updates, and how the updated chunks become parameters again.

Where a parameter's state is not divided (`placement.shard` of one rank), its only chunk is the parameter itself.
"""

from collections.abc import Container, Iterable, Mapping

import numpy as np
import paddle

from erniekit.parallel import comm
from erniekit.parallel.buckets import DEFAULT_LIMIT, Entry, plan_buckets, take_chunk
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import ALONE
from erniekit.parallel.sharded_units import ShardedUnits, chunk_of, joined_chunks


def entries_of(
    tensors: Mapping[str, paddle.Tensor],
    placements: Mapping[str, Placement],
    model_chunks: Mapping[str, int],
    one_moment: Container[str] = (),
    units: Mapping[str, str] | None = None,
) -> dict[str, Entry]:
    """Parameters as the plan of buckets sees them, by name; see ShardedParameters. Their shapes suffice. `units`: the
    block of each whose weight is divided (ZeRO stage 3).
    """
    blocks = units or {}
    return {
        name: Entry(
            name,
            tuple(p.shape),
            _dtype(p),
            placements[name],
            model_chunks.get(name, 0),
            1 if name in one_moment else 2,
            blocks.get(name, ""),
        )
        for name, p in tensors.items()
    }


class ShardedParameters:
    """The trainable parameters of this rank, and the chunks and buckets into which they are divided.

    Args:
        parameters: this rank's parameters by name, in the model's order; frozen ones are left out.
        placements: the placement of each trainable parameter.
        model_chunks: the chunk of the pipeline stage that a parameter belongs to; 0 where it is not named.
        limit: elements of a bucket.
        one_moment: the parameters whose optimizer state has one moment instead of two.
        units: the blocks whose weights are divided, too (ZeRO stage 3).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, paddle.Tensor]],
        placements: Mapping[str, Placement],
        model_chunks: Mapping[str, int] | None = None,
        limit: int = DEFAULT_LIMIT,
        one_moment: Container[str] = (),
        units: ShardedUnits | None = None,
    ) -> None:
        self.tensors = {name: p for name, p in parameters if not p.stop_gradient}
        self.units = units
        unit_names = {} if units is None else {name: entry.unit for name, entry in units.entries.items()}
        self.entries = entries_of(self.tensors, placements, model_chunks or {}, one_moment, unit_names)
        self.buckets = plan_buckets(list(self.entries.values()), limit)
        self._check_plan()

    @classmethod
    def single(
        cls, parameters: Iterable[tuple[str, paddle.Tensor]], one_moment: Container[str] = ()
    ) -> "ShardedParameters":
        """The parameters of one process, of which nothing is divided."""
        named = list(parameters)
        placement = Placement(ALONE, ALONE, ALONE, ALONE, ALONE, copies=1)
        return cls(named, {name: placement for name, _ in named}, one_moment=one_moment)

    def _check_plan(self) -> None:
        """Ranks that exchange gradients must have planned the same buckets, otherwise they would add up gradients of
        different parameters.
        """
        groups = {bucket.placement.gradient.ranks: bucket.placement.gradient for bucket in self.buckets}
        for ranks, group in groups.items():
            local_plan = [
                [bucket.width, *(entry.name for entry in bucket.entries)]
                for bucket in self.buckets
                if bucket.placement.gradient.ranks == ranks
            ]
            plans = comm.gather_objects(local_plan, group)
            assert all(plan == plans[0] for plan in plans), f"ranks {ranks} hold different parameters"

    @paddle.no_grad()
    def local_chunk(self, name: str) -> paddle.Tensor:
        """What this rank updates of a parameter: the parameter itself, or where the state is divided this
        rank's chunk [c], padded with zeros: a copy, or, of a divided weight, all that there is of it.
        """
        if self.units is not None and name in self.units.values:
            return self.units.values[name].chunk
        return self.chunk_of(name, self.tensors[name])

    @paddle.no_grad()
    def chunk_of(self, name: str, parameter: paddle.Tensor) -> paddle.Tensor:
        """The `local_chunk` of another tensor of a parameter's shape."""
        entry = self.entries[name]
        return parameter if entry.placement.shard.size == 1 else chunk_of(entry, parameter)

    @paddle.no_grad()
    def publish(self, updated: Mapping[str, paddle.Tensor]) -> None:
        """Gather the updated chunks of all ranks into the parameters. A parameter that `updated` does not name keeps
        its values. Divided weights are gathered when they are used.
        """
        for bucket in self.buckets:
            shard = bucket.placement.shard
            if shard.size == 1 or bucket.unit:
                continue
            chunks = [updated[e.name] if e.name in updated else self.local_chunk(e.name) for e in bucket.entries]
            matrix = comm.all_gather(paddle.concat(chunks), shard).reshape([shard.size, bucket.columns])
            for entry, rows in zip(bucket.entries, paddle.split(matrix, bucket.sections[:-1], axis=1), strict=True):
                paddle.assign(joined_chunks(rows, entry.shape), self.tensors[entry.name])

    @paddle.no_grad()
    def whole(self, name: str, chunk: paddle.Tensor) -> paddle.Tensor:
        """A tensor of a parameter's shape from the chunks [c] of all ranks, on the device. Every rank of the
        parameter's shard group has to call it. Where nothing is divided, `chunk` as it is.
        """
        entry = self.entries[name]
        if entry.placement.shard.size == 1:
            return chunk
        return joined_chunks(comm.all_gather(chunk, entry.placement.shard), entry.shape)

    def gather(self, name: str, chunk: paddle.Tensor) -> np.ndarray:
        """The result of `whole` as an array on the host."""
        return self.whole(name, chunk).numpy()

    def scatter(self, name: str, whole: np.ndarray) -> np.ndarray:
        """This rank's chunk [c] of a tensor of a parameter's shape; the whole tensor where nothing is divided."""
        shard = self.entries[name].placement.shard
        return whole if shard.size == 1 else take_chunk(whole, shard.index, shard.size)


def _dtype(parameter: paddle.Tensor) -> str:
    return str(parameter.dtype).removeprefix("paddle.")
