"""Distillation: the divergence of a model's predictions from those of another one, fused with both output heads and
chunked over tokens, so that [tokens, vocabulary] is never whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import paddle
from paddle.autograd import PyLayer

from erniekit.losses.lm import Head, HeadGradients, chunks_of
from erniekit.parallel import comm


def _log_probs(head: Head, hidden_TD: paddle.Tensor, temperature: float) -> paddle.Tensor:
    """log softmax of logits / temperature [T, V], fp32, V those of this rank."""
    logits = head.local_logits(hidden_TD).astype("float32")
    if temperature != 1.0:
        logits = logits / temperature
    largest = logits.max(axis=1, keepdim=True)
    if head.group is not None:
        largest = comm.all_reduce_(largest, head.group, op="max")
    logits = logits - largest
    total = paddle.exp(logits).sum(axis=1, keepdim=True)
    if head.group is not None:
        total = comm.all_reduce_(total, head.group)
    return logits - paddle.log(total)


@dataclass(frozen=True)
class Divergence:
    """The generalised Jensen-Shannon divergence beta KL(r || m) + (1 - beta) KL(p || m) with m = beta r + (1 - beta) p,
    of a model's predictions p from the teacher's r (Agarwal et al. 2023, arXiv 2306.13649, equation 1); with beta 0
    KL(r || p), and with beta 1 KL(p || r), as TRL has it. Both are of logits divided by `temperature`.
    """

    beta: float = 0.0
    temperature: float = 1.0

    def of(
        self, own: paddle.Tensor, teacher: paddle.Tensor, total: Callable[[paddle.Tensor], paddle.Tensor]
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The terms of the sum over the vocabulary, and the gradient of that sum for the logits, both [T, V]. own,
        teacher: log p and log r; `total` sums [T, 1] over the ranks that share the vocabulary.
        """
        p, r = paddle.exp(own), paddle.exp(teacher)
        if self.beta == 0:
            return r * (teacher - own), (p - r) / self.temperature
        if self.beta == 1:
            slope = own - teacher
            terms = p * slope
        else:
            mixture = paddle.logaddexp(own + math.log(1 - self.beta), teacher + math.log(self.beta))
            slope = (1 - self.beta) * (own - mixture)
            terms = self.beta * r * (teacher - mixture) + p * slope
        # The derivative by p_v is slope_v up to a constant, and that of p_v by the logits is p_v (1_v - p).
        mean = total((p * slope).sum(axis=1, keepdim=True))
        return terms, p * (slope - mean) / self.temperature


class _LinearDivergence(PyLayer):
    """The forward pass also forms the gradients, chunk by chunk, as in losses/lm.py."""

    @staticmethod
    def forward(
        ctx, hidden_TD, weight, bias, teacher_TD, teacher_head, token_weights_T, by_vocab, group, max_tokens, kind
    ):
        head = Head(weight, by_vocab, bias, group)
        sums, gradients = [], HeadGradients(head)

        def total(of_rank: paddle.Tensor) -> paddle.Tensor:
            return of_rank if group is None else comm.all_reduce_(of_rank, group)

        for rows in chunks_of(hidden_TD, head.vocab_size, max_tokens):
            teacher = _log_probs(teacher_head, teacher_TD[rows], kind.temperature)
            own = _log_probs(head, hidden_TD[rows], kind.temperature)
            terms, by_logits = kind.of(own, teacher, total)
            sums.append(terms.sum(axis=1))
            gradients.add(hidden_TD[rows], by_logits, token_weights_T[rows].unsqueeze(-1))
        ctx.gradients, ctx.hidden = gradients, hidden_TD
        divergence = total(paddle.concat(sums))
        return (divergence * token_weights_T).sum()

    @staticmethod
    def backward(ctx, dloss):
        grads = ctx.gradients.result(ctx.hidden, dloss.astype("float32"))
        ctx.gradients = ctx.hidden = None
        return (*grads, None)  # nothing for the teacher's states


FORWARD_KL = Divergence()


def linear_divergence(
    hidden_TD: paddle.Tensor,
    head: Head,
    teacher_TD: paddle.Tensor,
    teacher_head: Head,
    token_weights_T: paddle.Tensor,
    max_chunk_tokens: int,
    kind: Divergence = FORWARD_KL,
) -> paddle.Tensor:
    """sum_t w_t D(p_t, r_t) with p = softmax(head(h)) and r = softmax of the teacher's head, in nats; D is by default
    KL(r || p) (Hinton et al. 2015, arXiv 1503.02531, with temperature 1).

    hidden [T, D] and the teacher's [T, D'] after their final norms, weights [T] fp32 constants. The gradients are those
    of hidden and `head`; where ranks share the vocabulary, that of hidden is a partial sum on each.
    """
    return _LinearDivergence.apply(
        hidden_TD,
        head.weight,
        head.bias,
        teacher_TD.detach(),
        teacher_head,
        token_weights_T,
        head.by_vocab,
        head.group,
        max_chunk_tokens,
        kind,
    )
