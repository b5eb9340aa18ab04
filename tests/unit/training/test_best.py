"""The best evaluation: which one it is, and when a run stops early."""

import json

import pytest

from erniekit.config import Config
from erniekit.config.methods import METHODS
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


@pytest.mark.parametrize("stage", METHODS)
def test_a_checkpoint_keeps_the_best_evaluation_of_every_method(stage):
    """Its JSON has a list for a tuple, such as reward_funcs."""
    state, model = TrainState(step=1), BestModel(Config(stage=stage), {})
    model.note(state, {model.metric: 0.5})
    state.best_of = json.loads(json.dumps(state.best_of))
    assert model.forget_incomparable(state) is None
    assert state.best_metric == 0.5
