"""Pictures of a run: when they are drawn, and what the record of routers keeps for its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erniekit.config.schema import Config
from erniekit.training.reporting import picture as picture_module
from erniekit.training.reporting import routers
from erniekit.training.reporting.base import RunInfo, StepMetrics
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.picture import Picture
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.reporting.routers import RouterLog


def run_info(directory: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(directory, 10, start_step, 1_234_567, Config())


@pytest.mark.parametrize("picture", [LossPlot(), RouterLog(), CompletionLog(True, 0, 1)], ids=lambda each: each.name)
def test_saves_soon_after_one_another_do_not_wait_for_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Picture
):
    drawn: list[float] = []
    now = [100.0]
    monkeypatch.setattr(picture_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(type(picture), "draw_run", lambda self, directory: drawn.append(now[0]))
    picture.on_start(run_info(tmp_path))
    for now[0] in (130, 159, 160, 170, 219, 220, 230):
        picture.on_save(1, tmp_path)
    picture.on_end({})
    assert drawn == [160, 220, 230]


def routed(step: int, load: list[float]) -> StepMetrics:
    layer = {"load_max_over_mean": max(load) / (sum(load) / len(load)), "entropy": 1.0, "load": load}
    return StepMetrics(step, 1.0, 1.5, 1e-3, 100, 40, 0.5, routers={"1": layer, "2": layer})


def test_the_record_of_routers_goes_on_after_the_step_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two records of one run, of which the second resumes after step 60, are that of an uninterrupted run."""
    shown: list[tuple[list[Any], np.ndarray]] = []
    monkeypatch.setattr(routers, "draw", lambda last, worst, path: shown.append((last, worst)) or path.write_text(""))
    loads = {step: [1.0, step, 3.0, 2.0] for step in range(1, 101)}
    whole, first, second = RouterLog(), RouterLog(), RouterLog()
    (tmp_path / "whole").mkdir()
    for log_of_run, directory, steps, start in (
        (whole, "whole", range(1, 101), 0),
        (first, ".", range(1, 80), 0),
        (second, ".", range(61, 101), 60),
    ):
        log_of_run.on_start(run_info(tmp_path / directory, start))
        for step in steps:
            log_of_run.on_step(routed(step, loads[step]))
        log_of_run.on_end({})
    assert (tmp_path / "routers.jsonl").read_text() == (tmp_path / "whole" / "routers.jsonl").read_text()
    (last, worst), _, (last_resumed, worst_resumed) = shown
    assert last == last_resumed and [step["1"]["load"][1] for step in last] == list(range(51, 101))
    np.testing.assert_array_equal(worst, worst_resumed)
    assert worst[-1].tolist() == [100, *[100 / 26.5] * 3]


def test_odd_lines_in_the_record_of_routers_do_not_end_a_run(tmp_path: Path):
    (tmp_path / "routers.jsonl").write_text('{"step": 1}\n{"step": 2, "layers": {"1": {"load": [1]}}}\n[]\n{"st')
    log_of_run = RouterLog()
    log_of_run.on_start(run_info(tmp_path, start_step=2))
    log_of_run.on_step(routed(3, [1.0, 2.0, 3.0, 2.0]))
    log_of_run.on_end({})
    assert [json.loads(line)["step"] for line in (tmp_path / "routers.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")


def test_the_loads_of_experts_are_drawn(tmp_path: Path):
    log_of_run = RouterLog()
    log_of_run.on_start(run_info(tmp_path))
    for step in range(1, 4):
        log_of_run.on_step(routed(step, [1.0, 2.0, 3.0, 2.0]))
    log_of_run.on_end({})
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")
