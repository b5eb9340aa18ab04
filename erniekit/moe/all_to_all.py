"""Expert parallelism: all-to-all dispatch and combine (Lepikhin et al. 2020, arXiv 2006.16668, section 3).

A layer's experts are divided into one shard for each (expert rank, tensor rank), in this order. Every tensor rank has
the same tokens and processes the (token, expert) pairs of the shards with its tensor index; an all-to-all sends these
to the expert rank that has the expert. The output of a tensor rank is therefore a partial sum. Legend: E experts, L
experts of one shard, N expert ranks, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.moe.experts import Experts
from erniekit.nn.permute import permute
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks over which the experts of a layer are sharded. `sequence`: outside the layer, the tokens are divided
    over the tensor ranks, too.
    """

    tensor: Group
    expert: Group
    sequence: bool = False

    def enter(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """Gather the tokens of every tensor rank for the router: each rank computes the same from them, so that its
        gradient is complete.
        """
        return comm.gather_rows_replicated(x_TD, self.tensor) if self.sequence else x_TD

    def agree(self, experts_TK: paddle.Tensor) -> paddle.Tensor:
        """Replace the choice of experts by that of the first tensor rank."""
        return comm.broadcast_(experts_TK, 0, self.tensor)

    def copy(self, x: paddle.Tensor) -> paddle.Tensor:
        """The identity for an input of this rank's experts alone; its gradient is summed over the tensor ranks."""
        return comm.copy_to(x, self.tensor)

    def leave(self, y_TD: paddle.Tensor) -> paddle.Tensor:
        """Sum the partial results of the tensor ranks."""
        return (comm.scatter_rows if self.sequence else comm.reduce_from)(y_TD, self.tensor)

    def local_pairs(self, experts_TK: np.ndarray, num_local: int) -> np.ndarray:
        """Which (token, expert) pairs this tensor rank processes [T, K]."""
        return experts_TK // num_local % self.tensor.size == self.tensor.index

    def start(
        self,
        experts: Experts,
        rows: paddle.Tensor,
        weights_R1: paddle.Tensor | None,
        counts: list[int],
        num_tokens: int,
    ) -> Callable[[], paddle.Tensor]:
        """Send rows sorted by expert [R, D], `counts` of each expert [E], of `num_tokens` tokens, to the ranks of their
        experts, with the rows' routing weights where the experts take these. The function that is returned gives the
        experts' outputs [R, D], in the same order. Where the backend allows, the rows are sent while the caller
        computes something else before calling it.
        """
        num_local = len(counts) // (self.expert.size * self.tensor.size)
        by_shard = np.array(counts).reshape(self.expert.size, self.tensor.size, num_local)
        counts_NL = by_shard[:, self.tensor.index]
        if self.expert.size == 1:
            return lambda: experts(rows, counts_NL[0].tolist(), weights_R1)
        # Each rank also sends how many tokens it has: where no rank has any, the experts do not run and have no
        # gradient, as on one process.
        all_tokens = np.full((len(counts_NL), 1), num_tokens)
        incoming = comm.exchange_counts(np.concatenate([counts_NL, all_tokens], axis=1), self.expert)
        incoming_NL = incoming[:, :-1]
        if not incoming[:, -1].any():
            return lambda: rows
        sent, received = counts_NL.sum(axis=1).tolist(), incoming_NL.sum(axis=1).tolist()
        weights = None if weights_R1 is None else comm.start_exchange_rows(weights_R1, sent, received, self.expert)
        arrive = comm.start_exchange_rows(rows, sent, received, self.expert)

        def finish() -> paddle.Tensor:
            order = expert_major(incoming_NL)
            sorted_weights = None if weights is None else permute(weights(), order)
            done = experts(permute(arrive(), order), incoming_NL.sum(axis=0).tolist(), sorted_weights)
            return comm.exchange_rows(permute(done, np.argsort(order)), received, sent, self.expert)

        return finish


def expert_major(counts_NL: np.ndarray) -> np.ndarray:
    """The permutation [R] that takes rows sorted by source and then expert to the order by expert and then source.
    counts [N, L].
    """
    expert = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in counts_NL])
    return np.argsort(expert, kind="stable")
