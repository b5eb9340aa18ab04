"""Checks that copies of a parameter on several ranks stay equal bit for bit, which detects faulty links and memory."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.sharded_blocks import local_tensors
from erniekit.nn.shard import named_shard_specs
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.process_group import Group
from erniekit.utils.errors import TrainError
from erniekit.utils.wording import count_of


class ReplicaCheck:
    """Compares checksums of parameters, or of chunks of divided ones, and router biases among the ranks that hold the
    same values.
    """

    def __init__(self, model: CausalLM, mesh: Mesh) -> None:
        self._model = model
        shard_specs, divided = named_shard_specs(model), {} if model.units is None else model.units.entries
        by_group: dict[Group, list[str]] = defaultdict(list)
        for name in local_tensors(model):
            spec = shard_specs.get(name)
            is_expert = spec is not None and spec.over == "experts"
            if name in divided:
                by_group[divided[name].placement.replica].append(name)
            else:
                by_group[mesh.expert_data_group if is_expert else mesh.data_group].append(name)
            if spec is None:
                by_group[mesh.tensor_group].append(name)
        self._by_group = {group: names for group, names in by_group.items() if group.size > 1}

    def __call__(self, step: int) -> None:
        """Raises TrainError on every rank of a group whose members differ, naming parameter and ranks."""
        tensors = local_tensors(self._model)
        sums = {name: checksum(tensors[name]) for names in self._by_group.values() for name in names}
        problems = []
        for group, names in self._by_group.items():
            everywhere = comm.gather_objects([sums[name] for name in names], group)
            different = {
                name: [values[place] for values in everywhere]
                for place, name in enumerate(names)
                if any(values[place] != everywhere[0][place] for values in everywhere)
            }
            if different:
                problems.append(_message(step, group, different))
        if problems:
            raise TrainError(problems[0])


def _message(step: int, group: Group, different: Mapping[str, list[int]]) -> str:
    name, values = next(iter(different.items()))
    usual = Counter(values).most_common(1)[0][0]
    odd = [rank for rank, value in zip(group.ranks, values, strict=True) if value != usual]
    return (
        f"step {step}: ranks {', '.join(map(str, group.ranks))} should hold the same {name}, but on "
        f"{', '.join(map(str, odd))} it differs ({count_of(len(different), 'parameter differs', 'parameters differ')} "
        "in all). Memory or a link of that host may be faulty. Start again from the last checkpoint, which an earlier "
        "check found sound; check_replicas_steps says how often copies are compared."
    )


def checksum(tensor: paddle.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)
