"""The loss of judged answers against numbers and finite differences."""

import numpy as np
import paddle
import pytest

from erniekit.losses.kto import kto_loss

RATIOS = np.array([0.4, -1.2, 2.5, -0.3, 0.0])
GOOD = np.array([True, False, False, True, True])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def written_out(ratios, kl, beta, weights):
    """Equation 8 of the paper, one answer at a time."""
    return np.array(
        [
            weights[0] * (1 - sigmoid(beta * (h - kl))) if good else weights[1] * (1 - sigmoid(beta * (kl - h)))
            for h, good in zip(ratios, GOOD, strict=True)
        ]
    )


@pytest.mark.parametrize(("loss_type", "kl_used"), [("kto", 0.7), ("apo_zero_unpaired", 0.0)])
def test_values_and_gradients(loss_type, kl_used):
    ratios = paddle.to_tensor(RATIOS.astype(np.float32), stop_gradient=False)
    options = {"loss_type": loss_type, "beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5}
    loss = kto_loss(ratios, paddle.to_tensor(GOOD), 0.7, **options)
    loss.sum().backward()
    expected = written_out(RATIOS, kl_used, 0.3, (1.5, 0.5))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)  # fp32
    step = 1e-6
    slopes = [
        (written_out(RATIOS + move, kl_used, 0.3, (1.5, 0.5)) - expected).sum() / step for move in step * np.eye(5)
    ]
    np.testing.assert_allclose(ratios.grad.numpy(), slopes, rtol=1e-4)  # finite differences


def test_a_good_answer_is_made_likelier_and_a_bad_one_less_likely():
    ratios = paddle.zeros([2])
    ratios.stop_gradient = False
    options = {"loss_type": "kto", "beta": 0.1, "good_weight": 1.0, "bad_weight": 1.0}
    kto_loss(ratios, paddle.to_tensor([True, False]), 0.0, **options).sum().backward()
    assert ratios.grad[0] < 0 < ratios.grad[1]
