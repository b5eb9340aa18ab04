"""Warnings about keys for which a run has too few steps."""

import pytest

from erniekit.config import Config
from erniekit.training.short_runs import warn_if_nothing_compares, warn_if_too_short
from erniekit.utils import log

BEST, PATIENCE = {"load_best_model_at_end": True}, {"early_stopping_patience": 2}


@pytest.mark.parametrize(
    ("scheduler", "steps", "warmup", "named"),
    [
        ("cosine", 10, 20, "warmup_steps: 20 steps of warm-up, but the schedule ends at step 10"),
        ("cosine", 10, 10, ""),
        ("constant", 10, 20, ""),
        ("wsd:5", 100, 10, "lr_scheduler_type: wsd:5: the decay counts from step 5, so the learning rate drops"),
        ("wsd:10", 100, 10, ""),
        ("wsd", 100, 95, "lr_scheduler_type: wsd: the decay counts from step 90, so the learning rate drops"),
        ("wsd", 100, 90, ""),
        ("wsd", 10, 20, "but the schedule ends at step 10"),
    ],
)
def test_a_warm_up_that_outlasts_the_schedule_is_warned_about_once(scheduler, steps, warmup, named):
    with log.captured() as said:
        for _ in range(2):  # a run that resumes plans its steps twice
            warn_if_too_short(Config(lr_scheduler_type=scheduler, warmup_steps=warmup), steps)
    assert [is_warning and named in text for is_warning, text in said] == [True] * bool(named)


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
def test_a_run_that_ends_before_its_first_evaluation_says_what_has_no_effect(keys, eval_steps, named):
    with log.captured() as said:
        warn_if_nothing_compares(Config(**{"evaluation_strategy": "steps", "eval_steps": eval_steps} | keys), 10)
    assert [named in text for _, text in said] == [True] * bool(named)


@pytest.mark.parametrize(
    ("keys", "done", "named"),
    [
        ({}, 0, ""),
        ({"profile": True}, 0, ""),
        ({"profile": True}, 8, "profile: no effect: 2 steps are left to train and profile_step_start is 3. Lower"),
        ({"profile": True, "profile_step_start": 11, "profile_step_end": 12}, 0, "10 steps are left to train"),
        ({"profile": True}, 10, ""),  # a finished run trains and measures nothing
    ],
)
def test_a_profile_that_no_step_reaches_is_warned_about_at_the_start(keys, done, named):
    with log.captured() as said:
        warn_if_too_short(Config(**keys), 10, done)
    assert [named in text for _, text in said] == [True] * bool(named)
