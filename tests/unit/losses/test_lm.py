"""The fused head and cross-entropy against the formula, through both head layouts and at the borders of chunks."""

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.losses import lm
from erniekit.losses.lm import Head, linear_cross_entropy
from erniekit.plan import job

TOKENS, SIZE, VOCAB = 7, 5, 11


@pytest.fixture(params=[1, 2, 3, 7, 100], ids=lambda n: f"chunks of {n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lm, "_CHUNK_ELEMENTS", request.param * VOCAB)
    return request.param


def test_a_small_vocabulary_makes_no_long_chunk_and_the_plan_counts_the_same():
    assert [part.stop - part.start for part in lm.chunks_of(paddle.zeros([5000, 1]), VOCAB, 10**9)] == [2048, 2048, 904]
    for name in ("_CHUNK_ELEMENTS", "_CHUNK_TOKENS", "_GPU_CHUNK_ELEMENTS"):
        assert vars(job)[name] == vars(lm)[name]


def example(by_vocab: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hidden, weight, bias, labels, token weights."""
    random = np.random.default_rng(0)
    shape = (VOCAB, SIZE) if by_vocab else (SIZE, VOCAB)
    weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0])
    labels = np.array([0, 10, 3, 3, 7, 0, 10])
    return random.normal(size=(TOKENS, SIZE)), random.normal(size=shape), random.normal(size=VOCAB), labels, weights


def nll_of(by_vocab: bool, labels: np.ndarray) -> Callable[..., np.ndarray]:
    def formula(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        logits = hidden @ (weight.T if by_vocab else weight) + bias
        highest = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
        return log_sum - logits[np.arange(len(labels)), labels]

    return formula


def tensor(array: np.ndarray, frozen: bool = False) -> paddle.Tensor:
    return paddle.to_tensor(array.astype(np.float32), stop_gradient=frozen)


@pytest.mark.parametrize("by_vocab", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_every_gradient_follow_the_formula(by_vocab: bool, with_bias: bool, chunk: int):
    hidden, weight, bias, labels, weights = example(by_vocab)
    if not with_bias:
        bias = np.zeros(VOCAB)
    hidden_t, weight_t, bias_t = tensor(hidden), tensor(weight), tensor(bias)
    head = Head(weight_t, by_vocab, bias_t if with_bias else None)
    loss, nll, _ = linear_cross_entropy(hidden_t, head, paddle.to_tensor(labels), tensor(weights, frozen=True))
    formula = nll_of(by_vocab, labels)
    np.testing.assert_allclose(nll.numpy(), formula(hidden, weight, bias), rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx((formula(hidden, weight, bias) * weights).sum(), rel=1e-5)
    (loss * 3.0).backward()  # what comes from above scales every gradient
    ours = [hidden_t, weight_t, *([bias_t] if with_bias else [])]
    for which, argument in enumerate(ours):
        expected = numeric_gradient(formula, [hidden, weight, bias], which, 3.0 * weights)
        np.testing.assert_allclose(argument.grad.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert nll.stop_gradient


@pytest.mark.parametrize("by_vocab", [True, False], ids=["tied", "untied"])
def test_without_gradients_the_numbers_are_the_same(by_vocab: bool, chunk: int):
    hidden, weight, bias, labels, weights = example(by_vocab)
    head = Head(tensor(weight), by_vocab, tensor(bias))
    arguments = (tensor(hidden), head, paddle.to_tensor(labels))
    loss, nll, _ = linear_cross_entropy(*arguments, tensor(weights, frozen=True))
    with paddle.no_grad():
        quiet_loss, quiet_nll, _ = linear_cross_entropy(*arguments, tensor(weights, frozen=True))
    np.testing.assert_allclose(quiet_nll.numpy(), nll.numpy(), rtol=1e-6, atol=1e-6)
    assert quiet_loss.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("by_vocab", [True, False], ids=["tied", "untied"])
def test_z_loss_is_the_squared_logsumexp_with_its_gradients(by_vocab: bool, chunk: int):
    hidden, weight, bias, labels, weights = example(by_vocab)
    tensors = [tensor(a) for a in (hidden, weight, bias)]
    head = Head(tensors[1], by_vocab, tensors[2])
    arguments = (tensors[0], head, paddle.to_tensor(labels), tensor(weights, frozen=True))
    loss, nll, z_squared = linear_cross_entropy(*arguments, z_weight=0.3)

    def squared(*inputs: np.ndarray) -> np.ndarray:
        logits = inputs[0] @ (inputs[1].T if by_vocab else inputs[1]) + inputs[2]
        return np.log(np.exp(logits).sum(-1)) ** 2

    def formula(*inputs: np.ndarray) -> np.ndarray:
        return nll_of(by_vocab, labels)(*inputs) + 0.3 * squared(*inputs)

    inputs = [hidden, weight, bias]
    np.testing.assert_allclose(z_squared.numpy(), squared(*inputs), rtol=1e-4)
    assert loss.item() == pytest.approx((formula(*inputs) * weights).sum(), rel=1e-5)
    loss.backward()
    for which, ours in enumerate(tensors):
        expected = numeric_gradient(formula, inputs, which, weights)
        np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-3, atol=2e-4)
    assert nll.stop_gradient and z_squared.stop_gradient


def test_a_smaller_chunk_can_be_asked_for():
    hidden, weight, _, labels, weights = example(True)
    results = []
    for most in (1, 4, 1 << 20):
        hidden_t, weight_t = tensor(hidden), tensor(weight)
        head = Head(weight_t, by_vocab=True)
        loss, _, _ = linear_cross_entropy(hidden_t, head, paddle.to_tensor(labels), tensor(weights, frozen=True), most)
        loss.backward()
        results.append((loss.numpy(), hidden_t.grad.numpy(), weight_t.grad.numpy()))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_tied_weight_collects_the_gradients_of_both_its_uses():
    _, weight, _, labels, weights = example(True)
    ids = np.array([1, 1, 2, 10, 0, 5, 3])
    weight_t = tensor(weight)
    embedded = paddle.nn.functional.embedding(paddle.to_tensor(ids), weight_t)
    loss, _, _ = linear_cross_entropy(
        embedded, Head(weight_t, by_vocab=True), paddle.to_tensor(labels), tensor(weights, frozen=True)
    )
    loss.backward()

    def formula(table: np.ndarray) -> np.ndarray:
        return nll_of(True, labels)(table[ids], table, np.zeros(VOCAB))

    np.testing.assert_allclose(
        weight_t.grad.numpy(), numeric_gradient(formula, [weight], 0, weights), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen: str):
    hidden, weight, bias, labels, weights = example(False)
    tensors = {
        name: tensor(value, frozen=name == frozen)
        for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias))
    }
    loss, _, _ = linear_cross_entropy(
        tensors["hidden"],
        Head(tensors["weight"], False, tensors["bias"]),
        paddle.to_tensor(labels),
        tensor(weights, frozen=True),
    )
    loss.backward()
    assert {name for name, value in tensors.items() if value.grad is None} == {frozen}


def test_inputs_are_left_alone():
    hidden, weight, bias, labels, weights = example(False)
    tensors = [tensor(a) for a in (hidden, weight, bias)]
    weights_t = tensor(weights, frozen=True)
    loss, _, _ = linear_cross_entropy(
        tensors[0], Head(tensors[1], False, tensors[2]), paddle.to_tensor(labels), weights_t
    )
    loss.backward()
    for ours, given in zip([*tensors, weights_t], (hidden, weight, bias, weights), strict=True):
        np.testing.assert_array_equal(ours.numpy(), given.astype(np.float32))


def test_large_logits_do_not_overflow():
    hidden, weight, _, labels, weights = example(False)
    hidden_t, weight_t = tensor(hidden * 1e3), tensor(weight)
    loss, _, _ = linear_cross_entropy(hidden_t, Head(weight_t, False), paddle.to_tensor(labels), tensor(weights, True))
    loss.backward()
    expected = (nll_of(False, labels)(hidden * 1e3, weight, np.zeros(VOCAB)) * weights).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(weight_t.grad.numpy()).all() and np.isfinite(hidden_t.grad.numpy()).all()
