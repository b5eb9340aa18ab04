"""Tensor and sequence parallelism of projections (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv
2205.05198).

A column-split projection takes whole tokens and gives a rank's outputs; a row-split one takes these and gives partial
sums. Between such pairs every tensor rank holds all tokens or, with sequence parallelism, an equal stretch of them.
"""

from dataclasses import dataclass

import paddle

from erniekit.nn.linear import Linear
from erniekit.parallel import comm
from erniekit.parallel.comm import Group


@dataclass(frozen=True)
class TensorRanks:
    """The ranks that share projections and vocabulary. `sequence`: between projections they also share the tokens,
    whose number must divide by the group's size.
    """

    group: Group
    sequence: bool = False

    def enter(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """Before a column-split product: [T or own stretch, D] -> [T, D]; gradients add up over the ranks."""
        return (comm.gather_rows if self.sequence else comm.copy_to)(x_TD, self.group)

    def leave(self, y_TD: paddle.Tensor) -> paddle.Tensor:
        """After a row-split product: partial sums [T, D] -> their sum [T or own stretch, D]."""
        return (comm.scatter_rows if self.sequence else comm.reduce_from)(y_TD, self.group)

    def own_span(self, num_tokens: int) -> tuple[int, int]:
        """[start, stop) of those of T tokens that are on this rank between projections."""
        if not self.sequence:
            return 0, num_tokens
        size = num_tokens // self.group.size
        return self.group.index * size, (self.group.index + 1) * size

    def lookup(self, ids: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        """Embedding rows of ids [T] where each rank holds an equal stretch of the vocabulary: [T or own stretch, D]."""
        size = weight.shape[0]
        own = ids - self.group.index * size
        is_own = (own >= 0) & (own < size)
        rows = paddle.nn.functional.embedding(own.clip(0, size - 1), weight)
        return self.leave(rows * is_own.astype(rows.dtype).unsqueeze(-1))

    def attach(self, linear: Linear) -> None:
        """Let a projection that was built with this rank's sizes communicate."""
        if linear.split == "column":
            linear.gather_input = self.enter
        elif linear.split == "row":
            linear.reduce_output = self.leave
