"""Experts divided over ranks: tokens travel to them and back (Lepikhin et al. 2020, arXiv 2006.16668, section 3).

A layer's experts form one share for each (expert rank, tensor rank), in this order. Every tensor rank sees the same
tokens and takes the (token, expert) pairs of its own column of shares; these go by all-to-all to the expert rank that
holds the expert. So a tensor rank's output is a partial sum. Legend: E experts, L experts of one share, N expert ranks,
R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.moe.dispatch import Assignment
from erniekit.moe.experts import Experts
from erniekit.parallel import comm
from erniekit.parallel.comm import Group


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks that share the experts of a layer. `sequence`: outside the layer, tensor ranks also share the
    tokens.
    """

    tensor: Group
    expert: Group
    sequence: bool = False

    def enter(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """The tokens of every tensor rank, for the router: each rank computes the same from them, and its gradient is
        the whole one.
        """
        return comm.gather_rows_replicated(x_TD, self.tensor) if self.sequence else x_TD

    def agree(self, experts_TK: paddle.Tensor) -> paddle.Tensor:
        """The first tensor rank's choice of experts."""
        return comm.broadcast_(experts_TK, 0, self.tensor)

    def copy(self, x: paddle.Tensor) -> paddle.Tensor:
        """What only this rank's experts use: the gradients of all tensor ranks add up."""
        return comm.copy_to(x, self.tensor)

    def leave(self, y_TD: paddle.Tensor) -> paddle.Tensor:
        """The tensor ranks' partial sums, added up."""
        return (comm.scatter_rows if self.sequence else comm.reduce_from)(y_TD, self.tensor)

    def own_pairs(self, experts_TK: np.ndarray, num_local: int) -> np.ndarray:
        """Which (token, expert) pairs this tensor rank takes [T, K]."""
        return experts_TK // num_local % self.tensor.size == self.tensor.index

    def start(
        self, experts: Experts, rows: paddle.Tensor, assignment: Assignment, num_tokens: int
    ) -> Callable[[], paddle.Tensor]:
        """Send rows sorted by expert [R, D], of `num_tokens` tokens, to the experts, wherever these are; the function
        that is returned gives what the experts made of them [R, D], in the same order. What is computed before it is
        called runs beside the journey where the backend allows.
        """
        num_local = len(assignment.counts) // (self.expert.size * self.tensor.size)
        by_share = np.array(assignment.counts).reshape(self.expert.size, self.tensor.size, num_local)
        counts_NL = by_share[:, self.tensor.index]
        if self.expert.size == 1:
            return lambda: experts(rows, counts_NL[0].tolist())
        # Each rank also sends how many tokens it has: where no rank has any, the experts do not run and have no
        # gradient, as on one process.
        all_tokens = np.full((len(counts_NL), 1), num_tokens)
        incoming = comm.exchange_counts(np.concatenate([counts_NL, all_tokens], axis=1), self.expert)
        incoming_NL = incoming[:, :-1]
        if not incoming[:, -1].any():
            return lambda: rows
        sent, received = counts_NL.sum(axis=1).tolist(), incoming_NL.sum(axis=1).tolist()
        arrive = comm.start_exchange_rows(rows, sent, received, self.expert)

        def finish() -> paddle.Tensor:
            order = expert_major(incoming_NL)
            done = experts(permute(arrive(), order), incoming_NL.sum(axis=0).tolist())
            return comm.exchange_rows(permute(done, np.argsort(order)), received, sent, self.expert)

        return finish


def expert_major(counts_NL: np.ndarray) -> np.ndarray:
    """Rows that lie by source and then by expert, in the order by expert and then by source [R]. counts [N, L]."""
    expert = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in counts_NL])
    return np.argsort(expert, kind="stable")


class _Permute(PyLayer):
    """A gather whose adjoint is a gather, too."""

    @staticmethod
    def forward(ctx, rows: paddle.Tensor, order: np.ndarray) -> paddle.Tensor:
        ctx.order = order
        return paddle.gather(rows, paddle.to_tensor(order))

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        return paddle.gather(dy, paddle.to_tensor(np.argsort(ctx.order)))


def permute(rows: paddle.Tensor, order: np.ndarray) -> paddle.Tensor:
    """rows[order] for a permutation of all rows [R, D]."""
    return _Permute.apply(rows, order) if len(order) else rows
