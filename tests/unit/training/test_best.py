"""The best evaluation: keys that need evaluations to compare."""

import logging

import pytest

from erniekit.config import Config
from erniekit.training.best import BestModel, warn_if_nothing_compares
from erniekit.training.state import TrainState

BEST, PATIENCE = {"load_best_model_at_end": True}, {"early_stopping_patience": 2}


@pytest.mark.parametrize(
    ("keys", "eval_steps", "named"),
    [
        (BEST | PATIENCE, 11, "load_best_model_at_end, early_stopping_patience: no effect: the run has 10 steps"),
        (PATIENCE, 11, "early_stopping_patience: no effect"),
        (BEST | PATIENCE, 10, ""),
        ({}, 11, ""),
        (BEST | {"evaluation_strategy": "epoch"}, None, ""),
    ],
)
def test_a_run_that_ends_before_its_first_evaluation_says_what_has_no_effect(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, keys, eval_steps, named
):
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    warn_if_nothing_compares(Config(**{"evaluation_strategy": "steps", "eval_steps": eval_steps} | keys), 10)
    assert named in caplog.text and bool(named) == bool(caplog.text)


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
