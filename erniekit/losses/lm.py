"""Next-token cross-entropy fused with the output head, chunked over tokens so that [tokens, vocabulary] is never
whole.
"""

from dataclasses import dataclass

import paddle
from paddle.autograd import PyLayer

from erniekit.nn import cpu_ops, decoding, fused, onednn
from erniekit.nn.narrow import add, matmul
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group

_CHUNK_ELEMENTS = 1 << 24  # logits alive at once on a CPU: 64 MB in fp32
_CHUNK_TOKENS = 1 << 11  # on a CPU, where more rows make a product no faster: matters for small vocabularies
_GPU_CHUNK_ELEMENTS = 1 << 28  # on a GPU, where few rows would be slow: 1 GB in fp32
_LARGE_EMBEDDING = 1 << 23  # numbers from which it does not fit a processor's cache
_KERNEL_RANGE = 60.0  # losses (nats) up to which Paddle's CPU kernel is exact


@dataclass(frozen=True)
class Head:
    """The output head's parameters: `weight` [V, D] if `by_vocab` (tied to the embedding), else [D, V]; `bias` [V] or
    None. Where a `group` of ranks shares the vocabulary, V is this rank's range of it, in rank order.
    """

    weight: paddle.Tensor
    by_vocab: bool
    bias: paddle.Tensor | None = None
    group: Group | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0 if self.by_vocab else 1]

    def local_logits(self, hidden_TD: paddle.Tensor) -> paddle.Tensor:
        """[T, D] -> [T, V], V those of this rank."""
        if self.by_vocab and _suits_onednn(hidden_TD, self.weight):
            logits = onednn.matmul(hidden_TD, self.weight, transpose_y=True)
        else:
            logits = matmul(hidden_TD, self.weight, transpose_y=self.by_vocab)
        return logits if self.bias is None else add(logits, self.bias)

    def logits(self, hidden_TD: paddle.Tensor) -> paddle.Tensor:
        """[T, D] -> [T, V], V the whole vocabulary. With a group, without gradient."""
        logits = self.local_logits(hidden_TD)
        if self.group is None:
            return logits
        shares = comm.all_gather(logits.detach(), self.group).split(self.group.size)
        return paddle.concat(shares, axis=-1)


def _suits_onednn(hidden_TD: paddle.Tensor, weight_VD: paddle.Tensor) -> bool:
    """Whether oneDNN has the faster product of a few tokens and a large embedding, which is read as it stands: MKL
    transposes pieces of it first, which takes up to twice as long.
    """
    if not (decoding.is_running() and hidden_TD.dtype == weight_VD.dtype and cpu_ops.applies(hidden_TD)):
        return False
    vocab_size, size = weight_VD.shape
    return hidden_TD.shape[0] >= 4 and vocab_size * size >= _LARGE_EMBEDDING


def chunks_of(hidden_TD: paddle.Tensor, vocab_size: int, max_tokens: int) -> list[slice]:
    """Consecutive tokens whose logits may exist at a time: up to `max_tokens`, as far as the device has room."""
    num_tokens = hidden_TD.shape[0]
    if hidden_TD.place.is_cpu_place():
        room = min(_CHUNK_ELEMENTS // vocab_size, _CHUNK_TOKENS)
    else:
        room = _GPU_CHUNK_ELEMENTS // vocab_size
    size = max(1, min(num_tokens, max_tokens, room))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _softmax_nll(logits_TV: paddle.Tensor, labels_T1: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """softmax [T, V] and -log softmax at the label [T, 1]. On a CPU by oneDNN, or in one pass by the kernel behind
    paddle's cross_entropy, which keeps the softmax to itself. There the kernel takes no logit for more than 64 below
    the largest, and the smallest probabilities are zero: large losses are computed again. A GPU's kernel has no such
    limit, and asking would stop the host.
    """
    if cpu_ops.applies(logits_TV):
        p = cpu_ops.softmax(logits_TV)
        nll = -paddle.log(cpu_ops.take_at(p, labels_T1))
    else:
        p, nll = paddle._C_ops.cross_entropy_with_softmax(logits_TV, labels_T1, False, True, True, -100, -1)
    if logits_TV.place.is_cpu_place() and bool((nll > _KERNEL_RANGE).any()):
        at_label = cpu_ops.take_at(logits_TV, labels_T1)
        nll = paddle.logsumexp(logits_TV, axis=-1, keepdim=True) - at_label
    return p, nll


def label_nll(logits_TV: paddle.Tensor, labels_T: paddle.Tensor) -> paddle.Tensor:
    """-log softmax(logits_t)[label_t] of each token [T], fp32, however large: what training minimises, for evaluation.
    logits [T, V] of the whole vocabulary, fp32; every label a real one. No gradient.
    """
    with paddle.no_grad():
        return _softmax_nll(logits_TV, labels_T.unsqueeze(-1))[1].squeeze(-1)


@dataclass(frozen=True)
class Softmax:
    """The softmax of a chunk of T tokens: `p` [T, V] this rank's probabilities, `nll` [T, 1] = -log p(label),
    `label_column` [T, 1] where the label is on this rank, `holds_label` [T, 1] 1 where it is there (None: everywhere),
    `z` [T, 1] logsumexp (None where the caller does not need it).
    """

    p: paddle.Tensor
    nll: paddle.Tensor
    label_column: paddle.Tensor
    holds_label: paddle.Tensor | None
    z: paddle.Tensor | None

    def minus_label(self, value_T1: paddle.Tensor) -> paddle.Tensor:
        """p + value at the label, in place of p."""
        value_T1 = value_T1 if self.holds_label is None else value_T1 * self.holds_label
        return cpu_ops.add_at_(self.p, self.label_column, value_T1)


def softmax_at(head: Head, hidden_TD: paddle.Tensor, labels_T1: paddle.Tensor, with_z: bool) -> Softmax:
    """Probabilities and losses of a chunk, in fp32. Ranks that share the vocabulary exchange three numbers a token."""
    logits = head.local_logits(hidden_TD).astype("float32")
    if head.group is None:
        at_label = cpu_ops.take_at(logits, labels_T1) if with_z else None
        p, nll = _softmax_nll(logits, labels_T1)
        return Softmax(p, nll, labels_T1, None, nll + at_label if with_z else None)
    column = labels_T1 - head.group.index * head.vocab_size
    holds_label = ((column >= 0) & (column < head.vocab_size)).astype("float32")
    column = column.clip(0, head.vocab_size - 1)
    largest = comm.all_reduce_(logits.max(axis=1, keepdim=True), head.group, op="max")
    at_label = cpu_ops.take_at(logits, column) * holds_label
    p = paddle.exp(logits.subtract_(largest))
    sums = comm.all_reduce_(paddle.concat([p.sum(axis=1, keepdim=True), at_label], axis=1), head.group)
    total, at_label = sums[:, :1], sums[:, 1:]
    z = paddle.log(total) + largest
    return Softmax(p.divide_(total), z - at_label, column, holds_label, z)


class HeadGradients:
    """Gradients of hidden states and head, collected chunk by chunk in fp32 and rounded once, at the end."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self._hidden: list[paddle.Tensor] = []
        self._weight: paddle.Tensor | None = None
        self._bias: paddle.Tensor | None = None

    def add(self, x_TD: paddle.Tensor, dlogits_TV: paddle.Tensor, scale_T1: paddle.Tensor) -> None:
        """A chunk whose logits have the gradient dlogits * scale, both fp32. The scale goes to the narrow [T, D] side
        of both products.
        """
        weight, bias, by_vocab = self.head.weight, self.head.bias, self.head.by_vocab
        p = dlogits_TV.astype(x_TD.dtype)
        self._hidden.append(cpu_ops.scale_rows(matmul(p, weight, transpose_y=not by_vocab).astype("float32"), scale_T1))
        if not weight.stop_gradient:
            scaled = cpu_ops.scale_rows(x_TD.astype("float32"), scale_T1).astype(x_TD.dtype)
            first, second = (p, scaled) if by_vocab else (scaled, p)
            self._weight = _add_product(first, second, self._weight)
        if bias is not None and not bias.stop_gradient:
            part = paddle.matmul(scale_T1, dlogits_TV, transpose_x=True).squeeze(0)
            self._bias = part if self._bias is None else self._bias + part

    def result(self, hidden_TD: paddle.Tensor, scale: paddle.Tensor | None = None) -> tuple[paddle.Tensor | None, ...]:
        """The gradients of hidden, weight and, if there is one, bias, each times `scale` (fp32; None: 1) and in the
        dtype of its tensor; None where that is frozen.
        """
        wide = (None if hidden_TD.stop_gradient else paddle.concat(self._hidden), self._weight, self._bias)
        owners = (hidden_TD, self.head.weight, self.head.bias)
        self._hidden, self._weight, self._bias = [], None, None
        grads = tuple(
            None if grad is None else (grad if scale is None else grad.multiply_(scale)).astype(owner.dtype)
            for grad, owner in zip(wide, owners, strict=True)
        )
        return grads if self.head.bias is not None else grads[:2]


def _add_product(left: paddle.Tensor, right: paddle.Tensor, total: paddle.Tensor | None) -> paddle.Tensor:
    """total + left^T right in fp32, in place of `total`."""
    if fused.applies(fused.ADD_PRODUCT, left):
        return fused.add_product(left, right, total)
    part = matmul(left, right, transpose_x=True).astype("float32")
    return part if total is None else total.add_(part)


class _LinearCrossEntropy(PyLayer):
    """The forward pass also forms the gradients, chunk by chunk: the loss is a weighted sum over tokens, so they only
    wait for one scalar.
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight, bias, labels_T, token_weights_T, by_vocab, group, max_tokens, z_weight):
        head = Head(weight, by_vocab, bias, group)
        nll_parts, z_parts, gradients = [], [], HeadGradients(head)
        for rows in chunks_of(hidden_TD, head.vocab_size, max_tokens):
            x, scale = hidden_TD[rows], token_weights_T[rows].unsqueeze(-1)
            softmax = softmax_at(head, x, labels_T[rows].unsqueeze(-1), bool(z_weight))
            nll_parts.append(softmax.nll.squeeze(-1))
            # d nll / d logits = p - onehot(label), and d z^2 / d logits = 2 z p: together f * (p - onehot / f) with the
            # factor f below, which goes to the scale, like the token's weight.
            minus = paddle.full_like(softmax.nll, -1.0)
            if softmax.z is not None and z_weight:
                z_parts.append(softmax.z.square().squeeze(-1))
                factor = 1.0 + 2.0 * z_weight * softmax.z
                minus, scale = minus / factor, scale * factor
            gradients.add(x, softmax.minus_label(minus), scale)
        nll_T = paddle.concat(nll_parts)
        ctx.gradients, ctx.hidden = gradients, hidden_TD
        z_T = paddle.concat(z_parts) if z_parts else paddle.zeros_like(nll_T)
        ctx.mark_non_differentiable(nll_T, z_T)
        return ((nll_T + z_weight * z_T) * token_weights_T).sum(), nll_T, z_T

    @staticmethod
    def backward(ctx, dloss, *_):
        # The loss is divided by a count afterwards: rounded to 16 bits, that factor alone would be off by up to 0.4 %.
        grads = ctx.gradients.result(ctx.hidden, dloss.astype("float32"))
        ctx.gradients = ctx.hidden = None
        return grads


def linear_cross_entropy(
    hidden_TD: paddle.Tensor,
    head: Head,
    labels_T: paddle.Tensor,
    token_weights_T: paddle.Tensor,
    max_chunk_tokens: int = _CHUNK_ELEMENTS,
    z_weight: float = 0.0,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """sum_t w_t * (-log softmax(head(h_t))[label_t] + z_weight * z_t^2), each -log p [T], and each z^2 [T] (0 without
    z_weight); the last two are fp32 and have no gradient. z = logsumexp of the logits (Chowdhery et al. 2022, arXiv
    2204.02311, section 5).

    hidden [T, D] after the final norm, labels [T] int64 (every one a real label: drop ignored positions first), weights
    [T] fp32 constants. The softmax is fp32. Peak memory is one chunk of logits (at most `max_chunk_tokens` rows of it)
    and the gradients of hidden and head, which the forward pass leaves ready. Where ranks share the vocabulary, the
    gradient of hidden is a partial sum on each.
    """
    return _LinearCrossEntropy.apply(
        hidden_TD,
        head.weight,
        head.bias,
        labels_T,
        token_weights_T,
        head.by_vocab,
        head.group,
        max_chunk_tokens,
        z_weight,
    )
