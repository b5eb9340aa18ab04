"""How a parameter is divided over the ranks that hold a model together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from paddle import nn


@dataclass(frozen=True)
class Cut:
    """A parameter divided along `axis`. `parts` are shares of that axis that were fused (q, k, v or gate, up; any
    common unit: widths of the whole or of one rank); each part is divided on its own. `over` says what divides it: the
    tensor ranks, or all ranks that share the experts of a layer (expert ranks times tensor ranks).
    """

    axis: int
    parts: tuple[int, ...] = ()
    over: Literal["tensor", "experts"] = "tensor"


class Divisible(nn.Layer):
    """A layer with parameters of its own that knows how they are divided. A parameter it does not name is whole on
    every rank.
    """

    def cuts(self) -> dict[str, Cut]:
        """Own parameter name -> its cut."""
        return {}

    def partial_gradients(self) -> tuple[str, ...]:
        """Own parameters that are whole on every tensor rank while their gradients are partial sums there."""
        return ()


def take(whole: np.ndarray, cut: Cut, index: int, count: int) -> np.ndarray:
    """Rank `index`'s share of `count`, as a view where the cut has no parts."""
    if count == 1:
        return whole
    pieces = []
    for begin, end in _spans(whole.shape[cut.axis], cut):
        width, rest = divmod(end - begin, count)
        assert not rest, (whole.shape, cut, count)
        pieces.append(_slice(whole, cut.axis, begin + index * width, begin + (index + 1) * width))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=cut.axis)


def join(shares: Sequence[np.ndarray], cut: Cut) -> np.ndarray:
    """The whole from every rank's share, in order: the inverse of `take`."""
    if len(shares) == 1:
        return shares[0]
    spans = _spans(shares[0].shape[cut.axis], cut)
    return np.concatenate([_slice(share, cut.axis, *span) for span in spans for share in shares], axis=cut.axis)


def _spans(size: int, cut: Cut) -> list[tuple[int, int]]:
    """[begin, end) of each fused part on an axis of `size`."""
    if not cut.parts:
        return [(0, size)]
    ends = np.cumsum(cut.parts) * size // sum(cut.parts)
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _slice(array: np.ndarray, axis: int, begin: int, end: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(begin, end),)]
