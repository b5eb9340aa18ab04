"""The best evaluation: which one it is, and when a run stops early."""

import pytest

from erniekit.config import Config
from erniekit.training.best import BestModel
from erniekit.training.state import TrainState


@pytest.mark.parametrize(
    ("keys", "values", "best"),
    [
        ({}, [3.0, 2.0, 4.0], 2),  # the loss
        ({"metric_for_best_model": "reward_margin"}, [3.0, 2.0, 4.0], 3),
        ({"metric_for_best_model": "eval_kl"}, [3.0, 2.0, 4.0], 2),
        ({"metric_for_best_model": "reward_rejected"}, [-1.0, -3.0, -2.0], 2),
        ({"metric_for_best_model": "logp_rejected"}, [-1.0, -3.0, -2.0], 2),
        ({"metric_for_best_model": "kl", "greater_is_better": True}, [3.0, 2.0, 4.0], 3),
    ],
)
def test_the_best_value_is_the_smallest_of_a_loss_or_a_divergence(keys, values, best):
    state, model = TrainState(), BestModel(Config(stage="DPO", **keys), {})
    for state.step, value in enumerate(values, 1):
        model.note(state, {model.metric: value})
    assert state.best_step == best
