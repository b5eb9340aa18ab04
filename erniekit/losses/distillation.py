"""Distillation: the divergence of a model's predictions from those of another one, fused with both output heads and
chunked over tokens, so that [tokens, vocabulary] is never whole.
"""

import paddle
from paddle.autograd import PyLayer

from erniekit.losses.lm import Head, HeadGradients, chunks_of
from erniekit.parallel import comm


def _log_probs(head: Head, hidden_TD: paddle.Tensor) -> paddle.Tensor:
    """log softmax [T, V], fp32, V those of this rank."""
    logits = head.local_logits(hidden_TD).astype("float32")
    largest = logits.max(axis=1, keepdim=True)
    if head.group is not None:
        largest = comm.all_reduce_(largest, head.group, op="max")
    logits = logits - largest
    total = paddle.exp(logits).sum(axis=1, keepdim=True)
    if head.group is not None:
        total = comm.all_reduce_(total, head.group)
    return logits - paddle.log(total)


class _LinearDivergence(PyLayer):
    """The forward pass also forms the gradients, chunk by chunk, as in losses/lm.py."""

    @staticmethod
    def forward(ctx, hidden_TD, weight, bias, teacher_TD, teacher_head, token_weights_T, by_vocab, group, max_tokens):
        head = Head(weight, by_vocab, bias, group)
        sums, gradients = [], HeadGradients(head)
        for rows in chunks_of(hidden_TD, head.vocab_size, max_tokens):
            teacher = _log_probs(teacher_head, teacher_TD[rows])
            own, wanted = _log_probs(head, hidden_TD[rows]), paddle.exp(teacher)
            sums.append((wanted * (teacher - own)).sum(axis=1))
            gradients.add(hidden_TD[rows], paddle.exp(own) - wanted, token_weights_T[rows].unsqueeze(-1))
        ctx.gradients, ctx.hidden = gradients, hidden_TD
        divergence = paddle.concat(sums)
        if group is not None:
            divergence = comm.all_reduce_(divergence, group)
        return (divergence * token_weights_T).sum()

    @staticmethod
    def backward(ctx, dloss):
        grads = ctx.gradients.result(ctx.hidden, dloss.astype("float32"))
        ctx.gradients = ctx.hidden = None
        return (*grads, None)  # nothing for the teacher's states


def linear_divergence(
    hidden_TD: paddle.Tensor,
    head: Head,
    teacher_TD: paddle.Tensor,
    teacher_head: Head,
    token_weights_T: paddle.Tensor,
    max_chunk_tokens: int,
) -> paddle.Tensor:
    """sum_t w_t KL(r_t || p_t) with p = softmax(head(h)) and r = softmax of the teacher's head, in nats (Hinton et al.
    2015, arXiv 1503.02531, with temperature 1).

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
    )
