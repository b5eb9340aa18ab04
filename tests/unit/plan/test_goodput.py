"""Failures and checkpoints: published rates, Young's and Daly's intervals, and drawn failures against the formula."""

import math

import pytest

from erniekit.plan.goodput import (
    RSC_GPU_HOURS,
    Failures,
    checkpoint_seconds,
    daly_interval,
    expected_seconds,
    plan_goodput,
    simulate_failures,
    young_interval,
)
from erniekit.plan.hardware import load_hardware
from erniekit.utils.errors import ConfigError

HOUR = 3600


def test_llama_3_failed_every_three_hours_and_was_effective_for_more_than_90_percent():
    failures = Failures(restart=300)
    assert failures.between(16384) / HOUR == pytest.approx(3.1, abs=0.05)
    planned = plan_goodput(16384, step=6.0, checkpoint=5.0, failures=failures)
    assert 0.90 < planned.share < 0.97
    assert planned.failures_a_day * 54 == pytest.approx(419, abs=1)


@pytest.mark.parametrize(("gpus", "hours"), [(16384, 1.8), (131072, 0.23)])
def test_the_projections_of_metas_research_clusters(gpus: int, hours: float):
    assert Failures(RSC_GPU_HOURS).between(gpus) / HOUR == pytest.approx(hours, rel=0.03)


@pytest.mark.parametrize(("checkpoint", "minutes", "waste"), [(60.0, 55, 0.036), (5.0, 16, 0.011)])
def test_2016_gpus_save_as_often_as_computed_by_hand(checkpoint: float, minutes: float, waste: float):
    planned = plan_goodput(2016, step=20.0, checkpoint=checkpoint, failures=Failures(detect=0, restart=0))
    assert planned.interval / 60 == pytest.approx(minutes, rel=0.03)
    assert 1 - planned.share == pytest.approx(waste, abs=0.001)
    assert planned.steps == round(planned.interval / 20)


def test_dalys_interval_is_the_best_one():
    checkpoint, between = 30.0, 10_000.0
    best = daly_interval(checkpoint, between)
    assert best == pytest.approx(young_interval(checkpoint, between), rel=0.05)
    costs = [expected_seconds(1.0, best * factor, checkpoint, between, 300) for factor in (0.8, 1.0, 1.25)]
    assert costs[1] == min(costs)
    assert daly_interval(500.0, 100.0) == 100.0


def test_drawn_failures_agree_with_the_formula():
    drawn = simulate_failures(2e6, 1000, 60, 10_000, 300, runs=20)
    assert drawn == pytest.approx(expected_seconds(2e6, 1000, 60, 10_000, 300), rel=0.01)


def test_the_parts_of_the_waste_add_up():
    for policy in ("restart", "elastic"):
        for spares in (True, False):
            planned = plan_goodput(2016, 20.0, 60.0, Failures(spares=spares), policy, unit=96)
            assert sum(planned.waste.values()) == pytest.approx(1 - planned.share)
            assert min(planned.waste.values()) > 0


def test_without_spares_an_elastic_job_does_not_wait():
    failures = Failures(spares=False)
    waiting = plan_goodput(2016, 20.0, 5.0, failures, "restart", unit=96)
    elastic = plan_goodput(2016, 20.0, 5.0, failures, "elastic", unit=96)
    spare = plan_goodput(2016, 20.0, 5.0, Failures(), "restart", unit=96)
    assert waiting.share < elastic.share < spare.share


def test_saving_too_rarely_costs_repeated_work():
    best = plan_goodput(2016, 20.0, 60.0, Failures())
    rare = plan_goodput(2016, 20.0, 60.0, Failures(), save_steps=20 * best.steps)
    assert rare.share < best.share
    assert rare.waste["repeated work"] > 5 * best.waste["repeated work"]


def test_a_checkpoint_in_the_background_stops_training_for_the_copy_alone():
    card = load_hardware("H800")
    assert checkpoint_seconds(50e9, card) == pytest.approx(1.0)
    assert checkpoint_seconds(50e9, card, in_background=False, host_gb_s=4.0) == pytest.approx(1 + 100)


@pytest.mark.parametrize("wrong", [{"gpu_hours": 0}, {"gpu_hours": -1}, {"gpu_hours": math.nan}, {"restart": -1}])
def test_absurd_numbers_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError):
        Failures(**wrong)
