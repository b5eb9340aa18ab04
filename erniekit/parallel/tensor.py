"""Tensor and sequence parallelism of projections (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv
2205.05198).

A column-split projection computes some of the outputs from all inputs; a row-split one computes partial sums from
these. Between such pairs every tensor rank has all tokens or, with sequence parallelism, an equal span of them.
"""

from dataclasses import dataclass

import paddle

from erniekit.nn.linear import Linear
from erniekit.nn.narrow import multiply
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group


@dataclass(frozen=True)
class TensorRanks:
    """The ranks over which projections and vocabulary are sharded. `sequence`: between projections the tokens are
    divided over them, too; their number must be a multiple of the group's size.
    """

    group: Group
    sequence: bool = False

    def enter(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """Before a column-split product: [T or this rank's span, D] -> [T, D]; gradients are summed over the ranks."""
        return (comm.gather_rows if self.sequence else comm.copy_to)(x_TD, self.group)

    def leave(self, y_TD: paddle.Tensor) -> paddle.Tensor:
        """After a row-split product: partial sums [T, D] -> their sum [T or this rank's span, D]."""
        return (comm.scatter_rows if self.sequence else comm.reduce_from)(y_TD, self.group)

    def own_span(self, num_tokens: int) -> tuple[int, int]:
        """[start, stop) of those of T tokens that are on this rank between projections."""
        if not self.sequence:
            return 0, num_tokens
        size = num_tokens // self.group.size
        return self.group.index * size, (self.group.index + 1) * size

    def lookup(self, ids: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        """Embedding rows of ids [T], each rank having an equal span of the vocabulary: [T or this rank's span, D]."""
        size = weight.shape[0]
        local_ids = ids - self.group.index * size
        is_local = (local_ids >= 0) & (local_ids < size)
        rows = paddle.nn.functional.embedding(local_ids.clip(0, size - 1), weight)
        return self.leave(multiply(rows, is_local.astype(rows.dtype).unsqueeze(-1)))

    def attach(self, linear: Linear) -> None:
        """Add communication to a projection that was built with this rank's sizes."""
        if linear.split == "column":
            linear.gather_input = self.enter
        elif linear.split == "row":
            linear.reduce_output = self.leave
