"""Declares how a parameter is sharded over the ranks that share a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import paddle
from paddle import nn

from erniekit.nn.roles import DeclaresRoles


@dataclass(frozen=True)
class ShardSpec:
    """A parameter divided along `axis`. `parts` are shares of that axis that were fused (q, k, v or gate, up; any
    common unit: widths of the whole or of one rank); each part is divided on its own. `over` says what divides it: the
    tensor ranks, or all ranks that share the experts of a layer (expert ranks times tensor ranks).
    """

    axis: int
    parts: tuple[int, ...] = ()
    over: Literal["tensor", "experts"] = "tensor"


class Shardable(DeclaresRoles):
    """A layer with parameters of its own that knows how they are divided. A parameter it does not name is whole on
    every rank.
    """

    def shard_specs(self) -> dict[str, ShardSpec]:
        """The parameters that are divided, and how, by their names in this layer."""
        return {}

    def partial_gradients(self) -> tuple[str, ...]:
        """Own parameters that are whole on every tensor rank while their gradients are partial sums there."""
        return ()


def shard(whole: np.ndarray, spec: ShardSpec, index: int, count: int) -> np.ndarray:
    """Rank `index`'s share of `count`, as a view where the parameter has no fused parts."""
    if count == 1:
        return whole
    pieces = []
    for begin, end in _spans(whole.shape[spec.axis], spec):
        width, rest = divmod(end - begin, count)
        assert not rest, (whole.shape, spec, count)
        pieces.append(_slice(whole, spec.axis, begin + index * width, begin + (index + 1) * width))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=spec.axis)


def unshard(shares: Sequence[np.ndarray], spec: ShardSpec) -> np.ndarray:
    """The whole from every rank's share, in order: the inverse of `shard`."""
    if len(shares) == 1:
        return shares[0]
    spans = _spans(shares[0].shape[spec.axis], spec)
    return np.concatenate([_slice(share, spec.axis, *span) for span in spans for share in shares], axis=spec.axis)


def share_of(whole: paddle.Tensor, spec: ShardSpec, index: int, count: int) -> paddle.Tensor:
    """`shard` of a tensor on the device."""
    axis, pieces = spec.axis, []
    for begin, end in _spans(whole.shape[axis], spec):
        width = (end - begin) // count
        pieces.append(whole.slice([axis], [begin + index * width], [begin + (index + 1) * width]))
    return pieces[0] if len(pieces) == 1 else paddle.concat(pieces, axis=axis)


def joined(shares: Sequence[paddle.Tensor], spec: ShardSpec) -> paddle.Tensor:
    """`unshard` of tensors on the device."""
    spans = _spans(shares[0].shape[spec.axis], spec)
    pieces = [share.slice([spec.axis], [begin], [end]) for begin, end in spans for share in shares]
    return paddle.concat(pieces, axis=spec.axis)


def _spans(size: int, spec: ShardSpec) -> list[tuple[int, int]]:
    """[begin, end) of each fused part on an axis of `size`."""
    if not spec.parts:
        return [(0, size)]
    ends = np.cumsum(spec.parts) * size // sum(spec.parts)
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _slice(array: np.ndarray, axis: int, begin: int, end: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(begin, end),)]


def named_shard_specs(model: nn.Layer) -> dict[str, ShardSpec]:
    """Parameter name -> how it is divided, for every parameter of `model` that can be."""
    return {
        f"{prefix}.{name}" if prefix else name: spec
        for prefix, layer in model.named_sublayers(include_self=True)
        if isinstance(layer, Shardable)
        for name, spec in layer.shard_specs().items()
    }


@dataclass(frozen=True)
class RankShard:
    """A share of every projection (tensor ranks), of the experts (expert ranks times tensor ranks), and some of the
    layers (None: all), with or without the embedding in front and the head behind.
    """

    tensor_rank: int = 0
    tensor_degree: int = 1
    expert_rank: int = 0
    expert_degree: int = 1
    layers: tuple[int, ...] | None = None
    has_embedding: bool = True
    has_head: bool = True

    @property
    def expert_shares(self) -> int:
        """Into how many shares the experts of a layer are divided."""
        return self.expert_degree * self.tensor_degree

    def share(self, spec: ShardSpec) -> tuple[int, int]:
        """(index, count) of this process's share of a parameter that is divided by `spec`."""
        if spec.over == "tensor":
            return self.tensor_rank, self.tensor_degree
        return self.expert_rank * self.tensor_degree + self.tensor_rank, self.expert_shares


WHOLE = RankShard()
