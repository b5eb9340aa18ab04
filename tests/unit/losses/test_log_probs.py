"""Log-probabilities of answers: the formula, every gradient, chunks, and the fused cross-entropy as a second oracle."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.losses import log_probs
from erniekit.losses.lm import Head, linear_cross_entropy
from erniekit.losses.log_probs import answer_log_probs, token_log_probs, token_statistics

TOKENS, SIZE, VOCAB = 9, 5, 11
LABELS = np.array([-100, 3, 10, -100, 0, 7, 7, -100, 2])
DOCUMENTS = np.array([0, 1, 1, 1, 2, 2, 2, 3, 4])
ANSWERS = np.array([4, 1, 2])


def example(by_vocab):
    random = np.random.default_rng(0)
    shape = (VOCAB, SIZE) if by_vocab else (SIZE, VOCAB)
    return [random.normal(size=(TOKENS, SIZE)), random.normal(size=shape), random.normal(size=VOCAB)]


def formula(by_vocab):
    def sums(hidden, weight, bias):
        logits = hidden @ (weight.T if by_vocab else weight) + bias
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.array([
            sum(log_p[t, LABELS[t]] for t in range(TOKENS) if DOCUMENTS[t] == answer and LABELS[t] >= 0)
            for answer in ANSWERS
        ])  # fmt: skip

    return sums


@pytest.mark.parametrize("by_vocab", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_sums_and_every_gradient_follow_the_formula(by_vocab, most):
    values = example(by_vocab)
    hidden, weight, bias = (paddle.to_tensor(v.astype(np.float32), stop_gradient=False) for v in values)
    upstream = np.array([1.0, -2.0, 0.5])
    sums = answer_log_probs(hidden, Head(weight, by_vocab, bias), LABELS, DOCUMENTS, ANSWERS, most)
    np.testing.assert_allclose(sums.numpy(), formula(by_vocab)(*values), rtol=1e-5)
    (sums * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    for which, tensor in enumerate((hidden, weight, bias)):
        expected = numeric_gradient(formula(by_vocab), values, which, upstream)
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_no_grad_records_nothing():
    hidden, weight, _ = (paddle.to_tensor(v.astype(np.float32), stop_gradient=False) for v in example(True))
    weight.stop_gradient = True
    labels = paddle.to_tensor(np.array([1, 2, 3]))
    token_log_probs(hidden[:3], Head(weight, True), labels, 100).sum().backward()
    assert weight.grad is None and hidden.grad is not None
    with paddle.no_grad():
        assert token_log_probs(hidden[:3], Head(weight, True), labels, 100).stop_gradient


def test_equal_to_the_fused_cross_entropy():
    hidden, weight, bias = (paddle.to_tensor(v.astype(np.float32), stop_gradient=False) for v in example(False))
    head, labels = Head(weight, False, bias), paddle.to_tensor(LABELS.clip(0))
    token_log_probs(hidden, head, labels, 4).sum().backward()
    ours = [t.grad.numpy() for t in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.clear_grad()
    loss, _, _ = linear_cross_entropy(hidden, head, labels, paddle.ones([TOKENS]))
    (-loss).backward()
    for gradient, tensor in zip(ours, (hidden, weight, bias), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_statistics_and_their_gradients_equal_plain_autograd(temperature: float, has_bias: bool):
    """Log-probabilities and entropies of softmax(logits / temperature), as paddle's own operators differentiate them.
    Tolerance: fp32 sums over 50 logits.
    """
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=[9, 6]).astype(np.float32)
    weight = rng.normal(size=[6, 50]).astype(np.float32)
    bias = rng.normal(size=[50]).astype(np.float32)
    labels = paddle.to_tensor(rng.integers(0, 50, 9))
    weights = [paddle.to_tensor(rng.normal(size=[9]).astype(np.float32)) for _ in range(2)]

    def inputs() -> list[paddle.Tensor]:
        tensors = [paddle.to_tensor(array) for array in (hidden, weight, bias)]
        for tensor in tensors:
            tensor.stop_gradient = False
        return tensors

    ours, plain = inputs(), inputs()
    head = Head(ours[1], False, ours[2] if has_bias else None)
    log_p, entropy = token_statistics(ours[0], head, labels, 4, temperature)
    (log_p * weights[0] + entropy * weights[1]).sum().backward()
    logits = (paddle.matmul(plain[0], plain[1]) + (plain[2] if has_bias else 0.0)) / temperature
    all_log_p = paddle.nn.functional.log_softmax(logits, axis=-1)
    wanted_log_p = paddle.take_along_axis(all_log_p, labels.unsqueeze(-1), 1).squeeze(-1)
    wanted_entropy = -(all_log_p.exp() * all_log_p).sum(-1)
    (wanted_log_p * weights[0] + wanted_entropy * weights[1]).sum().backward()
    np.testing.assert_allclose(log_p.numpy(), wanted_log_p.numpy(), atol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), wanted_entropy.numpy(), atol=1e-5)
    for mine, theirs in zip(ours[: 3 if has_bias else 2], plain, strict=False):
        np.testing.assert_allclose(mine.grad.numpy(), theirs.grad.numpy(), atol=2e-5)


def test_without_its_gradient_the_entropy_is_only_reported():
    hidden = paddle.randn([5, 6])
    hidden.stop_gradient = False
    head = Head(paddle.randn([6, 20]), False)
    log_p, entropy = token_statistics(hidden, head, paddle.zeros([5], dtype="int64"), 8, entropy_gradient=False)
    assert entropy.stop_gradient and not log_p.stop_gradient


@pytest.mark.parametrize("length", [1, 128, 129, 20_000])
def test_sums_of_answers_longer_than_a_piece(length: int):
    """Beside a short one and one without values, in another order than they lie in. fp32 sums of up to 20,000."""
    values = np.random.default_rng(0).normal(size=length + 5).astype(np.float32)
    starts, counts = np.array([3, 0, 2, length + 3]), np.array([length, 2, 0, 2])
    numbers = paddle.to_tensor(values, stop_gradient=False)
    sums = log_probs._sums(numbers, starts, counts)
    expected = [
        values[start : start + count].sum(dtype=np.float64) for start, count in zip(starts, counts, strict=True)
    ]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=0, atol=1e-6 * (1 + np.abs(values).sum()))
    (sums * paddle.to_tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    expected_gradient = np.array([2.0, 2.0, 0.0, *[1.0] * length, 4.0, 4.0])
    np.testing.assert_array_equal(numbers.grad.numpy(), expected_gradient)
