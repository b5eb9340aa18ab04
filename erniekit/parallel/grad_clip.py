"""The norm of the whole model's gradients, and clipping by it."""

import math
from collections.abc import Mapping

import numpy as np
import paddle

from erniekit.parallel import comm
from erniekit.parallel.buckets import Entry
from erniekit.parallel.process_group import Group


@paddle.no_grad()
def squared_norms(gradients: Mapping[str, paddle.Tensor]) -> paddle.Tensor:
    """The squared norm of each gradient, on the device: fp32 [n]."""
    squares = [paddle._C_ops.squared_l2_norm(gradient.astype("float32")) for gradient in gradients.values()]
    return paddle.concat(squares) if squares else paddle.zeros([0])


def global_norm(
    gradients: Mapping[str, paddle.Tensor],
    entries: Mapping[str, Entry],
    world: Group,
    squares: np.ndarray | None = None,
) -> float:
    """Euclidean norm of the gradients of all ranks (squares summed in fp32 within a tensor, in fp64 over tensors and
    ranks), each element counted once whatever the number of ranks that have it. The same bits on every rank.

    Args:
        gradients: those of this rank: whole tensors, or chunks where the optimizer state is divided.
        entries: the parameters by name.
        world: all ranks.
        squares: squared_norms(gradients), where the caller has read them together with other numbers.
    """
    squares = squared_norms(gradients).numpy() if squares is None else squares
    placements = (entries[name].placement for name in gradients)
    weighted = [
        square * placement.shard.size / placement.copies
        for square, placement in zip(squares.tolist(), placements, strict=True)
    ]
    return math.sqrt(comm.sum_floats(np.array([math.fsum(weighted)]), world).item())


@paddle.no_grad()
def clip_(gradients: Mapping[str, paddle.Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where norm exceeds max_norm > 0 (Pascanu et al. 2013, arXiv 1211.5063,
    algorithm 1).
    """
    if max_norm <= 0.0 or norm <= max_norm:
        return
    for gradient in gradients.values():
        gradient.scale_(max_norm / norm)
