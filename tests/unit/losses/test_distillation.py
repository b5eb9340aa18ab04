"""The divergence from a teacher's predictions, and its gradients, against float64."""

import numpy as np
import paddle
import pytest

from erniekit.losses.distillation import Divergence, linear_divergence
from erniekit.losses.lm import Head


@pytest.mark.parametrize("max_tokens", [2, 100])
@pytest.mark.parametrize("by_vocab", [True, False])
def test_values_and_gradients(max_tokens: int, by_vocab: bool):
    """KL(r || p) = sum r (log r - log p), d / d logits = p - r; fp32 sums, so a part in 1e5."""
    rng = np.random.default_rng(0)
    hidden, teacher = rng.standard_normal((2, 5, 6))
    weight, teacher_weight = rng.standard_normal((2, 9, 6)) * 3
    token_weights = rng.uniform(0, 2, 5)

    def head(matrix: np.ndarray, trained: bool) -> Head:
        stored = matrix if by_vocab else matrix.T
        return Head(paddle.to_tensor(stored.astype(np.float32), stop_gradient=not trained), by_vocab)

    h, own = paddle.to_tensor(hidden.astype(np.float32), stop_gradient=False), head(weight, True)
    other, states = head(teacher_weight, False), paddle.to_tensor(teacher.astype(np.float32))
    loss = linear_divergence(h, own, states, other, paddle.to_tensor(token_weights.astype(np.float32)), max_tokens)
    (loss * 3.0).backward()

    log_p, log_r = (_log_softmax(x @ w.T) for x, w in ((hidden, weight), (teacher, teacher_weight)))
    expected = (np.exp(log_r) * (log_r - log_p)).sum(1) @ token_weights
    dlogits = (np.exp(log_p) - np.exp(log_r)) * token_weights[:, None] * 3.0
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    np.testing.assert_allclose(h.grad.numpy(), dlogits @ weight, rtol=1e-4, atol=1e-4)
    dweight = own.weight.grad.numpy() if by_vocab else own.weight.grad.numpy().T
    np.testing.assert_allclose(dweight, dlogits.T @ hidden, rtol=1e-4, atol=1e-4)
    assert other.weight.grad is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_the_generalised_divergence_and_its_gradient(beta: float, temperature: float):
    """Against float64 and its finite differences."""
    rng = np.random.default_rng(1)
    logits, teacher, weights = rng.standard_normal((3, 7)) * 2, rng.standard_normal((3, 7)) * 2, np.array([1.0, 0, 2])

    def divergence(own: np.ndarray) -> float:
        log_p, log_r = _log_softmax(own / temperature), _log_softmax(teacher / temperature)
        p, r = np.exp(log_p), np.exp(log_r)
        if beta in (0, 1):
            terms = r * (log_r - log_p) if beta == 0 else p * (log_p - log_r)
        else:
            log_m = np.log(beta * r + (1 - beta) * p)
            terms = beta * r * (log_r - log_m) + (1 - beta) * p * (log_p - log_m)
        return float(terms.sum(1) @ weights)

    head = Head(paddle.eye(7), True)  # the hidden states are the logits
    h = paddle.to_tensor(logits.astype(np.float32), stop_gradient=False)
    states, weights_T = paddle.to_tensor(teacher.astype(np.float32)), paddle.to_tensor(weights.astype(np.float32))
    loss = linear_divergence(h, head, states, head, weights_T, 2, Divergence(beta, temperature))
    loss.backward()
    assert loss.item() == pytest.approx(divergence(logits), rel=1e-5)
    step = 1e-6
    slopes = np.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        moved = logits.copy()
        moved[place] += step
        slopes[place] = (divergence(moved) - divergence(logits)) / step
    np.testing.assert_allclose(h.grad.numpy(), slopes, atol=2e-5)  # fp32, and the error of a difference


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
