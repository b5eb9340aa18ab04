"""Log-probabilities of given tokens, and of answers made of them, as differentiable numbers."""

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.losses.lm import Head, HeadGradients, chunks_of, softmax_at
from erniekit.nn.narrow import gather


class _TokenLogProbs(PyLayer):
    """The backward pass computes each chunk's logits again: what multiplies them is known only then, and [tokens,
    vocabulary] must not wait for it.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight, bias, labels_T, by_vocab, group, max_tokens):
        head = Head(weight, by_vocab, bias, group)
        ctx.head, ctx.hidden, ctx.labels, ctx.max_tokens = head, hidden_TD, labels_T, max_tokens
        parts = [
            softmax_at(head, hidden_TD[rows], labels_T[rows].unsqueeze(-1), False).nll.squeeze(-1)
            for rows in chunks_of(hidden_TD, head.vocab_size, max_tokens)
        ]
        return -paddle.concat(parts)

    @staticmethod
    @paddle.no_grad()
    def backward(ctx, dlog_p_T):
        gradients = HeadGradients(ctx.head)
        for rows in chunks_of(ctx.hidden, ctx.head.vocab_size, ctx.max_tokens):
            x = ctx.hidden[rows]
            softmax = softmax_at(ctx.head, x, ctx.labels[rows].unsqueeze(-1), False)
            # d log p / d logits = onehot(label) - p
            gradients.add(x, softmax.minus_label(paddle.full_like(softmax.nll, -1.0)), -dlog_p_T[rows].unsqueeze(-1))
        result = gradients.result(ctx.hidden)
        ctx.head = ctx.hidden = ctx.labels = None
        return result


def token_log_probs(hidden_TD: paddle.Tensor, head: Head, labels_T: paddle.Tensor, max_tokens: int) -> paddle.Tensor:
    """log softmax(head(h_t))[label_t] for each token: fp32 [T].

    hidden [T, D] after the final norm, labels [T] int64, every one a real label. The logits of up to `max_tokens`
    tokens exist at a time. Where ranks share the vocabulary, the gradient of hidden is a partial sum on each.
    """
    return _TokenLogProbs.apply(hidden_TD, head.weight, head.bias, labels_T, head.by_vocab, head.group, max_tokens)


def answer_log_probs(
    hidden_TD: paddle.Tensor,
    head: Head,
    labels_T: np.ndarray,
    documents_T: np.ndarray,
    answers: np.ndarray,
    max_tokens: int,
    ignore: int = -100,
) -> paddle.Tensor:
    """The sum of log p(label) over the labelled tokens of each document in `answers` [N]: fp32 [N].

    labels [T] (`ignore`: none) and documents [T], which rise, say what token t predicts and where it stands. Exactly
    the documents in `answers` have labels.
    """
    places = np.flatnonzero(labels_T != ignore)
    labelled, which = np.unique(documents_T[places], return_inverse=True)
    assert np.array_equal(labelled, np.sort(answers)), "answers have labels, and nothing else has"
    rows = gather(hidden_TD, paddle.to_tensor(places))
    log_p = token_log_probs(rows, head, paddle.to_tensor(labels_T[places]), max_tokens)
    sums = paddle.geometric.segment_sum(log_p, paddle.to_tensor(which))
    return paddle.gather(sums, paddle.to_tensor(np.searchsorted(labelled, answers)))
