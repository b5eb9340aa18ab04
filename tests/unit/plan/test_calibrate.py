"""The measured table is one that the planner reads, with the measured numbers."""

from pathlib import Path

import pytest

from erniekit.plan.calibrate import Measured, calibrate, measure, seconds_of
from erniekit.plan.hardware import load_hardware

MEASURED = Measured({64: 1e10, 256: 6e10, 512: 5e10, 1024: 8e10}, 12e9, 5e-6, 9e9)


def test_the_file_changes_the_cpu_of_the_table(tmp_path: Path):
    calibrate(tmp_path / "mine.yaml", "CPU", MEASURED)
    card, packaged = load_hardware("cpu", tmp_path / "mine.yaml"), load_hardware("cpu")
    assert card.peak("fp32") == pytest.approx(8e10)
    assert card.memory_bandwidth == pytest.approx(12e9)
    assert card.launch_seconds == pytest.approx(5e-6)
    assert card.efficiency.of_size(64) == pytest.approx(0.125)
    assert card.efficiency.of_size(512) == pytest.approx(0.75)  # noise does not make a larger product slower
    assert card.efficiency.of_size(1024) == 1.0
    assert packaged.peak("fp32") != card.peak("fp32")
    assert load_hardware("H800", tmp_path / "mine.yaml").half_peak == load_hardware("H800").half_peak


@pytest.mark.slow  # it takes times, which a busy machine stretches
def test_a_measurement_of_this_machine_is_plausible():
    measured = measure(sizes=(16, 64), megabytes=1, rounds=1)
    assert measured.flops[64] > measured.flops[16] > 0
    assert 1e8 < measured.memory < 1e12 and 0 < measured.launch < 0.1


def test_seconds_of_a_call():
    calls: list[int] = []
    assert 0 < seconds_of(lambda: calls.append(1), rounds=2) < 1e-3
    assert len(calls) > 100
