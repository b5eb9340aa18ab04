"""Log-probabilities of given tokens, and of answers made of them, as differentiable numbers."""

from dataclasses import replace

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.losses.lm import Head, HeadGradients, chunks_of, softmax_at
from erniekit.nn.narrow import gather
from erniekit.parallel import comm


class _TokenLogProbs(PyLayer):
    """The backward pass computes each chunk's logits again: what multiplies them is known only then, and [tokens,
    vocabulary] must not wait for it.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight, bias, labels_T, by_vocab, group, max_tokens, with_entropy, entropy_gradient):
        head = Head(weight, by_vocab, bias, group)
        ctx.head, ctx.hidden, ctx.labels, ctx.max_tokens = head, hidden_TD, labels_T, max_tokens
        log_p, entropy = [], []
        for rows in chunks_of(hidden_TD, head.vocab_size, max_tokens):
            softmax = softmax_at(head, hidden_TD[rows], labels_T[rows].unsqueeze(-1), False)
            log_p.append(-softmax.nll.squeeze(-1))
            if with_entropy:
                entropy.append(_entropy(softmax.p, head)[0].squeeze(-1))
        entropy_T = paddle.concat(entropy) if with_entropy else paddle.zeros([0])
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_T)
        return paddle.concat(log_p), entropy_T

    @staticmethod
    @paddle.no_grad()
    def backward(ctx, dlog_p_T, dentropy_T):
        gradients = HeadGradients(ctx.head)
        for rows in chunks_of(ctx.hidden, ctx.head.vocab_size, ctx.max_tokens):
            x, scale = ctx.hidden[rows], -dlog_p_T[rows].unsqueeze(-1)
            softmax = softmax_at(ctx.head, x, ctx.labels[rows].unsqueeze(-1), False)
            if not ctx.entropy_gradient:
                # d log p / d logits = onehot(label) - p
                gradients.add(x, softmax.minus_label(paddle.full_like(softmax.nll, -1.0)), scale)
                continue
            # d H / d logits = -p (log p + H)
            entropy, log_p = _entropy(softmax.p, ctx.head)
            of_entropy = -softmax.p * (log_p + entropy) * dentropy_T[rows].unsqueeze(-1)
            of_label = softmax.minus_label(paddle.full_like(softmax.nll, -1.0)) * scale
            gradients.add(x, of_label + of_entropy, paddle.ones_like(scale))
        result = gradients.result(ctx.hidden)
        ctx.head = ctx.hidden = ctx.labels = None
        return result


_SMALLEST = 1e-38  # a probability whose share of the entropy is nothing, and whose logarithm is finite


def _entropy(p_TV: paddle.Tensor, head: Head) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(-sum over the vocabulary of p log p [T, 1], log p [T, V]), V the probabilities of this rank."""
    log_p = paddle.log(p_TV.clip(min=_SMALLEST))
    entropy = -(p_TV * log_p).sum(axis=-1, keepdim=True)
    return (entropy if head.group is None else comm.all_reduce_(entropy, head.group)), log_p


def token_log_probs(hidden_TD: paddle.Tensor, head: Head, labels_T: paddle.Tensor, max_tokens: int) -> paddle.Tensor:
    """log softmax(head(h_t))[label_t] for each token: fp32 [T].

    hidden [T, D] after the final norm, labels [T] int64, every one a real label. The logits of up to `max_tokens`
    tokens exist at a time. Where ranks share the vocabulary, the gradient of hidden is a partial sum on each.
    """
    return _apply(hidden_TD, head, labels_T, max_tokens)[0]


def token_statistics(
    hidden_TD: paddle.Tensor,
    head: Head,
    labels_T: paddle.Tensor,
    max_tokens: int,
    temperature: float = 1.0,
    entropy_gradient: bool = True,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The log-probability of each label and the entropy of each token's distribution, softmax(head(h_t) / temperature):
    fp32 [T] each, with gradients, the entropy without if `entropy_gradient` is False; the other arguments are those of
    token_log_probs.
    """
    if temperature != 1.0:  # (h W + b) / t = (h / t) W + b / t
        hidden_TD = hidden_TD / temperature
        head = head if head.bias is None else replace(head, bias=head.bias / temperature)
    log_p, entropy = _apply(hidden_TD, head, labels_T, max_tokens, True, entropy_gradient)
    return log_p, entropy


def _apply(
    hidden_TD: paddle.Tensor,
    head: Head,
    labels_T: paddle.Tensor,
    max_tokens: int,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    return _TokenLogProbs.apply(
        hidden_TD,
        head.weight,
        head.bias,
        labels_T,
        head.by_vocab,
        head.group,
        max_tokens,
        with_entropy,
        entropy_gradient,
    )


def answer_log_probs(
    hidden_TD: paddle.Tensor,
    head: Head,
    labels_T: np.ndarray,
    documents_T: np.ndarray,
    answers: np.ndarray,
    max_tokens: int,
    ignore: int = -100,
    own: tuple[np.ndarray, np.ndarray] | None = None,
) -> paddle.Tensor:
    """The sum of log p(label) over the labelled tokens of each document in `answers` [N]: fp32 [N].

    labels [T] (`ignore`: none) and documents [T], which rise, say what token t predicts and where it stands. Exactly
    the documents in `answers` have labels. `own`: where `hidden` has a part of the T tokens, a mask of the labelled
    tokens that are in it, and their rows; the sums are then over these.
    """
    places = np.flatnonzero(labels_T != ignore)
    labelled, which = np.unique(documents_T[places], return_inverse=True)
    assert np.array_equal(labelled, np.sort(answers)), "answers have labels, and nothing else has"
    labels, numbers = labels_T[places], places
    if own is not None:
        # One more token, which weighs nothing, so that the graph is the same without any, and every answer has a sum.
        mask, numbers = own[0], np.append(own[1], 0)
        labels, which = np.append(labels[mask], 0), np.append(which[mask], len(labelled) - 1)
    log_p = token_log_probs(gather(hidden_TD, paddle.to_tensor(numbers)), head, paddle.to_tensor(labels), max_tokens)
    if own is not None:
        log_p = log_p * paddle.to_tensor(np.append(np.ones(len(numbers) - 1, np.float32), np.float32(0)))
    counts = np.bincount(which, minlength=len(labelled))
    of_answers = np.searchsorted(labelled, answers)
    return _sums(log_p, (np.cumsum(counts) - counts)[of_answers], counts[of_answers])


_PIECE = 128  # numbers that are added at a time


def _sums(values: paddle.Tensor, starts: np.ndarray, counts: np.ndarray) -> paddle.Tensor:
    """The sums of `counts` [N] consecutive values [n] from `starts` [N] on: [N]. Piece by piece, by tables that the
    host makes: Paddle's segment_sum has the host wait for a GPU, and adds in an order that is another at every run.
    """
    while True:
        pieces = np.maximum(1, -(-counts // _PIECE))
        first = np.cumsum(pieces) - pieces
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.full(pieces.sum() * _PIECE, len(values))  # the number of the zero behind the values
        table[np.repeat(first * _PIECE, counts) + inside] = np.repeat(starts, counts) + inside
        padded = paddle.concat([values, paddle.zeros([1], dtype=values.dtype)])
        values = paddle.gather(padded, paddle.to_tensor(table)).reshape([-1, _PIECE]).sum(axis=1)
        if len(values) == len(counts):
            return values
        starts, counts = first, pieces
