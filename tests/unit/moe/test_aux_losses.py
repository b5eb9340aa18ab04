"""Router losses against plain numpy formulas and finite differences, and the bias update."""

import numpy as np
import paddle
import pytest

from erniekit.moe.aux_losses import load_balance_loss, router_orthogonal_loss, router_z_loss
from erniekit.moe.expert_bias import update_biases
from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
from erniekit.moe.router import RouterOptions

RNG = np.random.default_rng(5)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_balance(probs, k, rows):
    total, start = 0.0, 0
    for n in rows:
        p = probs[start : start + n]
        chosen = np.zeros_like(p)
        np.put_along_axis(chosen, np.argsort(-p, axis=-1)[:, :k], 1.0, axis=-1)
        total += n * p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()
        start += n
    return total


@pytest.mark.parametrize("rows", [[12], [5, 7], [1, 10, 1]])
def test_balance_is_the_formula_row_by_row(rows):
    probs = softmax(RNG.normal(size=(12, 6)))
    got = load_balance_loss(paddle.to_tensor(probs.astype(np.float32)), RouterOptions(2), rows).item()
    assert got == pytest.approx(numpy_balance(probs, 2, rows), rel=1e-5)


def test_balance_per_token_is_k_when_the_load_is_even_and_more_when_it_is_not():
    even = np.full((4, 4), 0.25) + 1e-6 * np.eye(4)  # each expert is the first choice of one token
    assert load_balance_loss(
        paddle.to_tensor(even.astype(np.float32)), RouterOptions(1), [4]
    ).item() / 4 == pytest.approx(1.0, rel=1e-4)
    skewed = softmax(np.tile([4.0, 0, 0, 0], (4, 1)))
    assert load_balance_loss(paddle.to_tensor(skewed.astype(np.float32)), RouterOptions(1), [4]).item() / 4 > 3.0


def check_gradient(function, x):
    """Central differences in fp32: 1e-2 relative to the largest entry is what their rounding leaves."""
    t = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
    function(t).backward()
    got, want, eps = t.grad.numpy(), np.zeros_like(x), 1e-2
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        values = [function(paddle.to_tensor(v.astype(np.float32))).item() for v in (up, down)]
        want[index] = (values[0] - values[1]) / (2 * eps)
    np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())


def test_balance_gradient_goes_through_the_probabilities_alone():
    # Far-apart probabilities: a small change moves no token to another expert, so the counts are constants as defined.
    logits = RNG.permuted(np.tile(np.arange(5.0), (6, 1)), axis=1)
    check_gradient(
        lambda x: load_balance_loss(paddle.nn.functional.softmax(x, axis=-1), RouterOptions(2), [4, 2]), logits
    )


def test_z_loss_is_the_sum_of_squared_logsumexp():
    logits = RNG.normal(size=(7, 5))
    want = (np.log(np.exp(logits).sum(-1)) ** 2).sum()
    assert router_z_loss(paddle.to_tensor(logits.astype(np.float32))).item() == pytest.approx(want, rel=1e-5)
    check_gradient(router_z_loss, logits)


@pytest.mark.parametrize("groups", [1, 2])
def test_orthogonal_loss_is_the_mean_squared_entry_of_the_gram_matrix_minus_one(groups):
    weight = RNG.normal(size=(5, 6))
    unit = (weight / np.linalg.norm(weight, axis=0)).T.reshape(groups, 6 // groups, 5)
    want = np.mean([((w @ w.T - np.eye(len(w))) ** 2).mean() for w in unit])
    got = router_orthogonal_loss(paddle.to_tensor(weight.astype(np.float32)), groups).item()
    assert got == pytest.approx(want, rel=1e-5)
    check_gradient(lambda x: router_orthogonal_loss(x, groups), weight)


def layer():
    paddle.seed(0)
    return MoELayer(MoESizes(8, (4,), num_experts=4, num_shared=0, bias=False, init_std=0.5), RouterOptions(top_k=2))


def test_the_bias_moves_against_the_load():
    moe = layer()
    usages = {(3, 0): np.array([10, 2, 6, 6])}
    first, second = (update_biases({3: moe}, usages, 0.001) for _ in range(2))
    bias = moe.correction_bias.numpy()
    np.testing.assert_allclose(bias[0], [-0.002, 0.002, 0, 0], atol=1e-9)
    assert (first[3] + second[3]).tobytes() == bias.tobytes()


def test_a_frozen_router_keeps_its_bias():
    moe = layer()
    moe.gate.weight.stop_gradient = True
    assert not update_biases({3: moe}, {(3, 0): np.array([10, 2, 6, 6])}, 0.001)[3].any()
    assert not moe.correction_bias.numpy().any()


def test_the_bias_balances_a_skewed_router():
    """All tokens prefer expert 0; the bias alone must spread them, while no weight of the layer moves."""
    moe = layer()
    favourite = moe.gate.weight.numpy()[:, 0]
    x = paddle.to_tensor((RNG.normal(size=(256, 8)) + favourite / np.linalg.norm(favourite)).astype(np.float32))

    def usage():
        with paddle.no_grad():
            return moe(x, TokenInfo([256]))[1][0].usage

    before = usage()
    for _ in range(300):
        update_biases({3: moe}, {(3, 0): usage()}, 0.005)
    after = usage()
    assert before.max() / before.mean() > 1.5
    assert after.max() / after.mean() < 1.15
