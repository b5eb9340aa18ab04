"""Gathers the shards of a run to whole tensors, and decides which rank writes which tensor.

A checkpoint contains whole tensors whatever the layout of the run. Of each pipeline stage, one rank (the first data
rank, first tensor rank) writes everything but experts; of the ranks with the same experts, the first one writes these.
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
from erniekit.parallel.sharded_units import DividedTensor


class Shares:
    """The tensors of one process, and their relation to the tensors of all processes."""

    def __init__(
        self,
        mesh: Mesh,
        part: RankShard,
        shard_specs: Mapping[str, ShardSpec],
        embeddings: frozenset[str] = frozenset(),
    ) -> None:
        """`shard_specs`: those of the parameters that can be sharded. `embeddings`: the names with Role.EMBEDDING,
        which the last stage repeats for a tied head and for multi-token prediction.
        """
        self.mesh, self.shard, self.shard_specs, self.embeddings = mesh, part, shard_specs, embeddings

    @classmethod
    def of(cls, model: CausalLM, mesh: Mesh) -> "Shares":
        """The tensors of `model`, which is sharded over `mesh`."""
        embeddings = frozenset(name for name, role in named_roles(model).items() if role is Role.EMBEDDING)
        return cls(mesh, model.shard, named_shard_specs(model), embeddings)

    @classmethod
    def alone(cls) -> "Shares":
        """The tensors of a single process, which has all of them."""
        return cls(Mesh.single(), WHOLE, {})

    def spec(self, name: str) -> ShardSpec | None:
        """How a tensor is sharded; None if every rank of its stage has all of it."""
        spec = self.shard_specs.get(name)
        return None if spec is None or self.shard.share(spec)[1] == 1 else spec

    def is_repeated(self, name: str) -> bool:
        """Whether an earlier stage has the tensor, too, and writes it."""
        return name in self.embeddings and not self.shard.has_embedding

    def writes(self, name: str) -> bool:
        """Whether this rank writes the tensor; of sharded experts, its own rows."""
        spec, mesh = self.spec(name), self.mesh
        if self.is_repeated(name):
            return False
        if spec is not None and spec.over == "experts":
            return mesh.data < mesh.degrees.expert
        return mesh.data == 0 and mesh.tensor == 0

    def rows(self, name: str, shape: Iterable[int]) -> tuple[int, int] | None:
        """[begin, end) of this rank's experts in a stack, whose shard has `shape`; None if it is not sharded by
        experts.
        """
        spec = self.spec(name)
        if spec is None or spec.over != "experts":
            return None
        assert spec.axis == 0, (name, spec)
        num_local, (index, _) = next(iter(shape)), self.shard.share(spec)
        return index * num_local, (index + 1) * num_local

    def whole_shape(self, name: str, shape: Iterable[int]) -> Shape:
        """The shape of the whole tensor whose shard has `shape`."""
        sizes, spec = list(shape), self.spec(name)
        if spec is not None:
            sizes[spec.axis] *= self.shard.share(spec)[1]
        return tuple(sizes)

    @paddle.no_grad()
    def gather(self, name: str, share: paddle.Tensor | DividedTensor | np.ndarray) -> np.ndarray | None:
        """Gather what this rank `writes` of a tensor, fp32 on the host: the whole tensor, or the rows of this rank's
        experts; None where another rank writes it. The ranks of a stage call it for the same tensors in the same order.
        """
        if isinstance(share, DividedTensor):
            share = share.whole()
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
        """This rank's shard of a whole tensor; of stacked experts, `whole` already consists of its rows."""
        spec = self.spec(name)
        if spec is None or spec.over == "experts":
            return whole
        return np.ascontiguousarray(shard(whole, spec, *self.shard.share(spec)))

    @paddle.no_grad()
    def collect(self, tensors: Mapping[str, paddle.Tensor], names: Iterable[str]) -> Iterator[np.ndarray]:
        """Iterate over the whole tensors `names` in this order, fp32, one at a time on every rank: for small ones (an
        adapter) that one rank writes. `tensors` are this rank's; all ranks iterate together, to the end.
        """
        world = self.mesh.world_group
        for name in names:
            tensor = tensors.get(name)
            local = None if tensor is None else self.gather(name, tensor)
            if world.size == 1:
                assert local is not None, name
                yield local
                continue
            rows = None if local is None else self.rows(name, local.shape)
            everywhere = comm.gather_objects(None if local is None else [rows and rows[0], list(local.shape)], world)
            gathered = []
            for rank, header in enumerate(everywhere):
                if header is None:
                    continue
                first, shape = header
                shard = paddle.to_tensor(local) if rank == world.index else paddle.empty(shape, dtype="float32")
                gathered.append((first or 0, comm.broadcast_(shard, rank, world).numpy()))
            gathered.sort(key=lambda shard: shard[0])
            yield gathered[0][1] if len(gathered) == 1 else np.concatenate([array for _, array in gathered])
