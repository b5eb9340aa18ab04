"""A step of thousands of ranks: order statistics of the jitter, slow devices, and its picture and trace."""

import dataclasses
import itertools
import time

import published_runs
import pytest
import yaml

from erniekit.plan.hardware import load_hardware
from erniekit.plan.simulate import Disturbance, simulate_step
from erniekit.plan.timeline import chrome_trace, draw_timeline, write_trace
from erniekit.plan.timing import StepTime, step_time
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import read_json_object


def planned(name: str) -> StepTime:
    rows = yaml.safe_load((published_runs.DIRECTORY / "runs.yaml").read_text("utf-8"))
    row = next(row for row in rows if row["name"] == name)
    return step_time(published_runs.run_of_row(row), load_hardware(row["card"]))


@pytest.fixture(scope="module")
def ernie() -> StepTime:
    return planned("ERNIE-4.5-300B 2016 H800 dispatch hidden")


def test_without_disturbance_all_2016_ranks_take_the_planned_time(ernie: StepTime):
    step = simulate_step(ernie, Disturbance(0.0))
    assert step.seconds == pytest.approx(ernie.seconds)
    assert step.lost == pytest.approx(0)
    assert step.replicas.shape == (168,)


def test_jitter_costs_more_the_more_ranks_wait_for_one_another(ernie: StepTime):
    lost = [simulate_step(ernie, Disturbance(jitter)).lost for jitter in (0.01, 0.02, 0.05)]
    assert lost == sorted(lost)
    # Eight expert ranks wait in every action: the largest of 8 normal numbers is 1.42 standard deviations on average.
    assert lost[2] == pytest.approx(0.05 * 1.42, rel=0.3)


def test_one_slow_device_slows_all(ernie: StepTime):
    even, slow = (simulate_step(ernie, Disturbance(0.0, count, 1.3)) for count in (0, 1))
    assert 1.0 < slow.seconds / even.seconds <= 1.3
    waiting = slow.replicas == pytest.approx(even.replicas)
    assert slow.seconds == slow.replicas[slow.slowest] and not waiting


def test_a_seed_repeats_itself(ernie: StepTime):
    one, other, third = (simulate_step(ernie, Disturbance(0.03, seed=seed)).seconds for seed in (1, 1, 2))
    assert one == other != third


def test_16384_ranks_take_seconds():
    step = planned("Llama-3 405B 16384")
    before = time.process_time()
    simulated = simulate_step(step, Disturbance(0.02, 16, 1.2))
    assert time.process_time() - before < 20
    assert simulated.replicas.shape == (128,)
    assert simulated.seconds > step.seconds


@pytest.mark.parametrize(
    "wrong", [{"jitter": -0.1}, {"jitter": 1.0}, {"slow": -1}, {"slow": 1, "slowdown": 0.5}, {"jitter": float("nan")}]
)
def test_absurd_disturbances_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError):
        Disturbance(**wrong)  # type: ignore[arg-type]


def test_more_slow_devices_than_there_are(ernie: StepTime):
    with pytest.raises(ConfigError, match="3000 of 2016"):
        simulate_step(ernie, Disturbance(0, 3000, 1.2))


def test_the_trace_has_every_action_of_every_stage(tmp_path):
    run = planned("Korthikanti 175B selective").run
    run = dataclasses.replace(run, layout=dataclasses.replace(run.layout, microbatches=16))
    step = step_time(run, load_hardware("A100"))
    simulated = simulate_step(step, Disturbance(0.02))
    after = [stage.after for stage in step.stages]
    finished = simulated.timeline.finished[:, simulated.slowest].tolist()
    write_trace(tmp_path / "trace.json", chrome_trace(simulated.timeline.events, after, finished))
    rows = read_json_object(tmp_path / "trace.json", ConfigError)["traceEvents"]
    computing = [row for row in rows if row.get("cat") in ("forward", "backward")]
    assert len(computing) == 8 * 16 * 3 * 2  # stages, microbatches, chunks, directions
    for stage in range(8):
        mine = sorted((row["ts"], row["dur"]) for row in computing if row["pid"] == stage)
        assert all(start + length <= later + 1e-3 for (start, length), (later, _) in itertools.pairwise(mine))
    assert {row["args"]["name"] for row in rows if row["name"] == "process_name"} == {f"stage {n}" for n in range(8)}
    draw_timeline(tmp_path / "step.png", simulated.timeline.events, after, finished, "a step")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
