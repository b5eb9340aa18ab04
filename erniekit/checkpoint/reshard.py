"""A rank's share of a model and the whole of it: which tensors a rank writes, and how it gets them together.

A checkpoint holds whole tensors whatever the layout of the run. Of each pipeline stage, one rank (the first data rank,
first tensor rank) writes what is not an expert; the ranks that hold the experts for the first time write theirs.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.weights import Shape, to_numpy
from erniekit.nn.roles import Role, named_roles
from erniekit.nn.shard import WHOLE, RankShard, ShardSpec, named_shard_specs, shard, unshard
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh


class Shares:
    """The tensors that a process holds among those of all."""

    def __init__(
        self,
        mesh: Mesh,
        part: RankShard,
        shard_specs: Mapping[str, ShardSpec],
        embeddings: frozenset[str] = frozenset(),
    ) -> None:
        """`shard_specs`: of the parameters that can be divided, by name. `embeddings`: the names of Role.EMBEDDING,
        which the last stage repeats where the head is tied to it or looks ahead.
        """
        self.mesh, self.shard, self.shard_specs, self.embeddings = mesh, part, shard_specs, embeddings

    @classmethod
    def of(cls, model: CausalLM, mesh: Mesh) -> "Shares":
        """Those of `model`, this process's part."""
        embeddings = frozenset(name for name, role in named_roles(model).items() if role is Role.EMBEDDING)
        return cls(mesh, model.shard, named_shard_specs(model), embeddings)

    @classmethod
    def alone(cls) -> "Shares":
        """One process that holds everything."""
        return cls(Mesh.single(), WHOLE, {})

    def spec(self, name: str) -> ShardSpec | None:
        """How a tensor is divided; None if every rank of its stage holds all of it."""
        spec = self.shard_specs.get(name)
        return None if spec is None or self.shard.share(spec)[1] == 1 else spec

    def is_repeated(self, name: str) -> bool:
        """Whether an earlier stage holds the tensor, too, and writes it."""
        return name in self.embeddings and not self.shard.has_embedding

    def writes(self, name: str) -> bool:
        """Whether this rank writes the tensor; of divided experts, its own rows."""
        spec, mesh = self.spec(name), self.mesh
        if self.is_repeated(name):
            return False
        if spec is not None and spec.over == "experts":
            return mesh.data < mesh.degrees.expert
        return mesh.data == 0 and mesh.tensor == 0

    def rows(self, name: str, shape: Iterable[int]) -> tuple[int, int] | None:
        """[begin, end) of the experts that this rank holds of a stack, whose share has `shape`; None if it is not
        divided by experts.
        """
        spec = self.spec(name)
        if spec is None or spec.over != "experts":
            return None
        assert spec.axis == 0, (name, spec)
        held, (index, _) = next(iter(shape)), self.shard.share(spec)
        return index * held, (index + 1) * held

    def whole_shape(self, name: str, shape: Iterable[int]) -> Shape:
        """Of the tensor whose share here has `shape`."""
        sizes, spec = list(shape), self.spec(name)
        if spec is not None:
            sizes[spec.axis] *= self.shard.share(spec)[1]
        return tuple(sizes)

    @paddle.no_grad()
    def gather(self, name: str, share: paddle.Tensor | np.ndarray) -> np.ndarray | None:
        """A share -> what `writes` says, fp32 on the host: the whole tensor, or the rows of this rank's experts; None
        where another rank writes it. The tensor ranks of a stage call it for the same tensors in the same order.
        """
        spec = self.spec(name)
        if spec is None or spec.over == "experts":
            return (share if isinstance(share, np.ndarray) else to_numpy(share)) if self.writes(name) else None
        if self.is_repeated(name) or self.mesh.data != 0:
            return None
        group = self.mesh.tensor_group
        tensor = paddle.to_tensor(share) if isinstance(share, np.ndarray) else share.detach()
        shares = to_numpy(comm.all_gather(tensor, group)).reshape([group.size, *share.shape])
        return unshard(list(shares), spec) if self.writes(name) else None

    def shard_of(self, name: str, whole: np.ndarray) -> np.ndarray:
        """This rank's share of a whole tensor; of stacked experts, `whole` is already its rows."""
        spec = self.spec(name)
        if spec is None or spec.over == "experts":
            return whole
        return np.ascontiguousarray(shard(whole, spec, *self.shard.share(spec)))

    @paddle.no_grad()
    def collect(self, tensors: Mapping[str, paddle.Tensor], names: Iterable[str]) -> Iterator[np.ndarray]:
        """The whole tensors `names` in this order, fp32, one at a time on every rank: for what is small (an adapter)
        and written by one. `tensors`: this rank's; all ranks iterate together, to the end.
        """
        world = self.mesh.world_group
        for name in names:
            tensor = tensors.get(name)
            mine = None if tensor is None else self.gather(name, tensor)
            if world.size == 1:
                assert mine is not None, name
                yield mine
                continue
            rows = None if mine is None else self.rows(name, mine.shape)
            told = comm.gather_objects(None if mine is None else [rows and rows[0], list(mine.shape)], world)
            pieces = []
            for rank, (first, shape) in ((rank, said) for rank, said in enumerate(told) if said is not None):
                here = rank == world.index
                piece = paddle.to_tensor(mine) if here else paddle.empty(shape, dtype="float32")
                pieces.append((first or 0, comm.broadcast_(piece, rank, world).numpy()))
            pieces.sort(key=lambda piece: piece[0])
            yield pieces[0][1] if len(pieces) == 1 else np.concatenate([array for _, array in pieces])
