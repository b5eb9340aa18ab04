"""Learning-rate schedules against their formulas, written out independently."""

import math

import pytest

from erniekit.config import Config
from erniekit.training.lr_scheduler import build_schedule

PEAK, LOW = 1e-3, 1e-5


def rates(max_steps, **keys):
    cfg = Config(learning_rate=PEAK, min_lr=LOW, **keys)
    rate = build_schedule(cfg, max_steps)
    return [rate(step) for step in range(max_steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak():
    got = rates(20, lr_scheduler_type="linear", warmup_steps=4)
    assert got[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert got[4] == pytest.approx(PEAK)


def test_warmup_ratio_counts_when_warmup_steps_is_zero():
    assert (
        rates(20, lr_scheduler_type="linear", warmup_ratio=0.2)[:4]
        == rates(20, lr_scheduler_type="linear", warmup_steps=4)[:4]
    )


def test_linear_ends_at_zero():
    got = rates(10, lr_scheduler_type="linear")
    assert got == pytest.approx([PEAK * (1 - step / 10) for step in range(11)])


def test_cosine_goes_from_peak_to_min_lr():
    got = rates(10, lr_scheduler_type="cosine", warmup_steps=2)
    want = [LOW + (PEAK - LOW) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert got[2:] == pytest.approx(want)


def test_cosine_with_one_cycle_comes_back_up():
    got = rates(10, lr_scheduler_type="cosine", num_cycles=1.0)
    assert got[5] == pytest.approx(LOW)
    assert got[10] == pytest.approx(PEAK)


def test_polynomial_ends_at_lr_end():
    got = rates(10, lr_scheduler_type="polynomial", power=2.0, lr_end=1e-6)
    assert got == pytest.approx([1e-6 + (PEAK - 1e-6) * (1 - step / 10) ** 2 for step in range(11)])


def test_constant_has_no_warm_up_but_constant_with_warmup_has():
    assert set(rates(5, lr_scheduler_type="constant", warmup_steps=3)) == {PEAK}
    assert rates(5, lr_scheduler_type="constant_with_warmup", warmup_steps=3)[0] == pytest.approx(PEAK / 3)


def test_wsd_is_steady_up_to_step_n_then_decays_by_one_minus_sqrt():
    got = rates(20, lr_scheduler_type="wsd:10", decay_function="1-sqrt", warmup_steps=2)
    assert got[1:10] == pytest.approx([PEAK] * 9)
    want = [LOW + (PEAK - LOW) * (1 - math.sqrt(step / 10)) for step in range(11)]
    assert got[10:] == pytest.approx(want)


# Rates of ERNIEKit's wsd for a learning rate of 1, 10 steps of warm-up and 100 steps, by its formula: with p the
# progress of the decay from step N to the last, half_life is ((0.05^p - 0.05) / 0.95) * (1 - min_lr) + min_lr.
@pytest.mark.parametrize(
    ("schedule", "min_lr", "decay", "expected"),
    [
        (
            "wsd:60",
            0.0,
            "half_life",
            {10: 1.0, 59: 1.0, 60: 1.0, 69: 0.483837, 80: 0.182744, 90: 0.058671, 99: 0.004093},
        ),
        ("wsd:60", 0.1, "half_life", {60: 1.0, 69: 0.535454, 80: 0.264470, 100: 0.1}),
        ("wsd:60", 0.0, "1-sqrt", {60: 1.0, 70: 0.5, 80: 0.292893, 99: 0.012579}),
        ("wsd", 0.0, "half_life", {89: 1.0, 90: 1.0, 95: 0.182744, 99: 0.018383}),  # steady for 0.9 of all steps
        ("wsd:95", 0.0, "half_life", {94: 1.0, 95: 1.0, 97: 0.264957}),  # 95 + 10 are more steps than there are
        ("wsd:1000", 0.0, "half_life", {10: 1.0, 99: 1.0}),
        ("wsd:5", 0.0, "half_life", {9: 1.0, 10: 0.846454, 50: 0.202051}),  # the decay began within the warm-up
        ("wsd:0", 0.0, "half_life", {9: 1.0, 10: 0.727510, 50: 0.182744}),
    ],
)
def test_wsd_is_erniekits(schedule, min_lr, decay, expected):
    cfg = Config(learning_rate=1.0, min_lr=min_lr, warmup_steps=10, lr_scheduler_type=schedule, decay_function=decay)
    rate = build_schedule(cfg, 100)
    assert {step: rate(step) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_decay_steps_end_the_schedule_early():
    got = rates(10, lr_scheduler_type="cosine", decay_steps=5)
    assert got[5:] == pytest.approx([LOW] * 6)


def test_a_warm_up_may_be_longer_than_the_run():
    got = rates(10, lr_scheduler_type="cosine", warmup_steps=20)
    assert got[:10] == pytest.approx([PEAK * (step + 1) / 20 for step in range(10)])
