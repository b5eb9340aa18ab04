"""The loss of reward models against numpy and finite differences."""

import numpy as np
import paddle
import pytest

from erniekit.losses.reward_model import center_loss, pairwise_loss, score_metrics

CHOSEN, REJECTED = np.array([0.4, -1.2, 2.5, 30.0]), np.array([0.1, 0.9, -2.0, -60.0])
MARGINS = np.array([0.0, 0.5, 1.0, 2.0])


def written_out(chosen, rejected, margins, center):
    """TRL's RewardTrainer: -logsigmoid(chosen - rejected - margin) and center * (chosen + rejected)^2."""
    return np.logaddexp(0, -(chosen - rejected - margins)) + center * (chosen + rejected) ** 2


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, MARGINS])
def test_values_and_gradients(margins, center):
    chosen, rejected = (paddle.to_tensor(x.astype(np.float32), stop_gradient=False) for x in (CHOSEN, REJECTED))
    given = None if margins is None else paddle.to_tensor(margins.astype(np.float32))
    loss = pairwise_loss(chosen, rejected, given) + center * center_loss(chosen, rejected)
    loss.sum().backward()
    numbers = np.zeros(4) if margins is None else margins
    np.testing.assert_allclose(loss.numpy(), written_out(CHOSEN, REJECTED, numbers, center), rtol=1e-5, atol=1e-7)
    step = 1e-6
    for tensor, (c, r) in ((chosen, (step, 0.0)), (rejected, (0.0, step))):
        up, down = (written_out(CHOSEN + sign * c, REJECTED + sign * r, numbers, center) for sign in (1, -1))
        np.testing.assert_allclose(tensor.grad.numpy(), (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


def test_metrics_have_no_gradient():
    chosen = paddle.to_tensor([1.0, 2.0, 0.0], stop_gradient=False)
    metrics = score_metrics(chosen, paddle.to_tensor([0.0, 3.0, 0.0]))
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "reward_chosen": [1, 2, 0],
        "reward_rejected": [0, 3, 0],
        "reward_margin": [1, -1, 0],
        "reward_accuracy": [1, 0, 0],
    }
    assert all(value.stop_gradient for value in metrics.values())
