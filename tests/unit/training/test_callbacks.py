"""What a run reports: the metrics file above all, which a killed and resumed run must leave whole."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from erniekit.config.schema import Config
from erniekit.models.picture_balance import PatchLoad
from erniekit.training.callbacks import Callback, RunInfo, StepMetrics, build_callbacks
from erniekit.training.reporting import completions, metrics_file, plot
from erniekit.training.reporting import picture as picture_module
from erniekit.training.reporting.metrics_file import MetricsFile, read_metrics
from erniekit.training.reporting.plot import LossPlot, smooth
from erniekit.training.reporting.progress import ProgressReport
from erniekit.training.reporting.routers import RouterLog
from erniekit.training.reporting.summary import Summary
from erniekit.utils.errors import TrainError


def run_info(directory: Path, start_step: int = 0, max_steps: int = 10) -> RunInfo:
    return RunInfo(directory, max_steps, start_step, 1_234_567, Config())


def step_metrics(step: int, **changes: Any) -> StepMetrics:
    rest: dict[str, Any] = {"learning_rate": 1e-3, "num_tokens": 100, "num_supervised": 40, "seconds": 0.5}
    return StepMetrics(**({"step": step, "loss": 5.0 / step, "grad_norm": 1.5} | rest | changes))


def play(callbacks: list[Callback], run: RunInfo, steps: range, summary: dict[str, Any] | None = None) -> None:
    for callback in callbacks:
        callback.on_start(run)
    for step in steps:
        for callback in callbacks:
            callback.on_step(step_metrics(step))
    for callback in callbacks:
        callback.on_end({} if summary is None else summary)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from erniekit.utils import log

    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    monkeypatch.setattr(log, "warning", said.append)
    return said


def test_a_step_is_one_object_with_its_parts_beside_the_loss(tmp_path: Path):
    file = MetricsFile()
    file.on_start(run_info(tmp_path / "new"))
    file.on_step(step_metrics(1, parts={"lm_loss": 4.5, "router_balance_loss": 0.5}))
    file.on_evaluate(1, {"eval_loss": 4.0, "eval_perplexity": 54.6})
    # Read before the end: every line is on its way to the disk as soon as it is written.
    assert lines(tmp_path / "new") == [
        {
            "step": 1,
            "loss": 5.0,
            "grad_norm": 1.5,
            "learning_rate": 1e-3,
            "num_tokens": 100,
            "tokens_per_second": 200.0,
            "num_supervised": 40,
            "seconds": 0.5,
            "data_seconds": 0.0,
            "lm_loss": 4.5,
            "router_balance_loss": 0.5,
        },
        {"step": 1, "eval_loss": 4.0, "eval_perplexity": 54.6},
    ]


def test_nan_and_infinity_are_null_because_json_has_neither(tmp_path: Path):
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    file.on_step(step_metrics(1, loss=float("nan"), grad_norm=float("inf"), num_tokens=0, seconds=0.0))
    record = lines(tmp_path)[0]
    assert (record["loss"], record["grad_norm"], record["tokens_per_second"]) == (None, None, 0.0)


def test_resuming_drops_later_steps_and_a_torn_line_and_says_so(tmp_path: Path, messages: list[str]):
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    for step in range(1, 6):
        file.on_step(step_metrics(step))
        if step % 2 == 0:
            file.on_evaluate(step, {"eval_loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as torn:
        torn.write('{"step": 6, "loss": 0.8')
    play([MetricsFile()], run_info(tmp_path, start_step=3), range(4, 7))
    assert [("eval_loss" in line, line["step"]) for line in lines(tmp_path)] == [
        (False, 1),
        (False, 2),
        (True, 2),
        (False, 3),
        (False, 4),
        (False, 5),
        (False, 6),
    ]
    assert any("dropped 3 lines on steps after 3" in message for message in messages), messages
    assert any("dropped 1 incomplete line" in message for message in messages), messages


def test_a_last_line_without_its_line_end_is_kept_and_ended(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    play([MetricsFile()], run_info(tmp_path, start_step=2), range(3, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_run_from_the_beginning_replaces_the_record_of_another(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 1, "loss": 2.0}\n')
    play([MetricsFile()], run_info(tmp_path), range(1, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_resuming_without_the_old_record_says_so(tmp_path: Path, messages: list[str]):
    play([MetricsFile()], run_info(tmp_path, start_step=7), range(8, 9))
    assert [line["step"] for line in lines(tmp_path)] == [8]
    assert "begins after step 7" in messages[0]


def test_steps_survive_a_killed_process(tmp_path: Path):
    code = """
import os, signal, sys
from pathlib import Path
from erniekit.config.schema import Config
from erniekit.training.callbacks import RunInfo, StepMetrics, build_callbacks
callbacks = build_callbacks(Config())
for callback in callbacks:
    callback.on_start(RunInfo(Path(sys.argv[1]), 10, 0, 1, Config()))
for step in (1, 2, 3):
    for callback in callbacks:
        callback.on_step(StepMetrics(step, 1.0, 1.0, 1.0, 1, 1, 1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, cwd=Path.cwd())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_record_that_cannot_be_written_stops_the_run_with_advice(tmp_path: Path):
    (tmp_path / "out").write_text("a file stands where the directory should be")
    with pytest.raises(TrainError, match=r"out.metrics\.jsonl: cannot be written .*output_dir"):
        MetricsFile().on_start(run_info(tmp_path / "out"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_its_cause(tmp_path: Path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    with pytest.raises(TrainError, match="No space left on device"):
        file.on_step(step_metrics(1))


def test_the_plot_is_a_png_of_the_whole_record_drawn_at_saves_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(picture_module, "SECONDS_BETWEEN", 0)
    file, picture = MetricsFile(), LossPlot()
    run = run_info(tmp_path)
    file.on_start(run)
    picture.on_start(run)
    picture.on_save(0, tmp_path)
    assert not (tmp_path / "loss.png").exists()  # nothing to draw yet, and no complaint
    for step in range(1, 101):
        file.on_step(step_metrics(step))
    file.on_evaluate(50, {"eval_loss": 1.0})
    picture.on_save(50, tmp_path)
    first = (tmp_path / "loss.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    file.on_evaluate(100, {"eval_loss": 0.5})
    file.on_end({})
    picture.on_end({})
    assert (tmp_path / "loss.png").read_bytes() != first


def test_a_failing_plot_is_a_warning_and_the_record_stays(
    tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plot, "draw", fail)
    play([MetricsFile(), LossPlot()], run_info(tmp_path), range(1, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert any("loss.png: not drawn (RuntimeError: no fonts)" in message for message in messages), messages


def test_smoothing_keeps_a_straight_line_and_quiets_noise():
    line = np.arange(300.0)
    np.testing.assert_allclose(smooth(line)[5:-5], line[5:-5], atol=1e-9)
    assert len(smooth(line)) == 300
    noise = np.random.default_rng(0).normal(size=600)
    assert smooth(noise).std() < 0.35 * noise.std()
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_the_summary_counts_the_whole_run_over_resumptions(tmp_path: Path):
    first = MetricsFile()
    first.on_start(run_info(tmp_path))
    for step in range(1, 5):
        first.on_step(step_metrics(step))
    first.on_evaluate(2, {"eval_loss": 0.7})
    first.on_evaluate(4, {"eval_loss": 0.9})
    play([MetricsFile(), Summary()], run_info(tmp_path, start_step=4), range(5, 11), {"stopped": "max_steps"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = {
        "steps": 10,
        "max_steps": 10,
        "resumed_after_step": 4,
        "final_loss": 0.5,
        "best_eval_loss": 0.7,
        "best_eval_step": 2,
        "num_tokens": 1000,
        "num_supervised_tokens": 400,
        "step_seconds": 5.0,
        "median_step_tokens_per_second": 200.0,
        "num_parameters": 1_234_567,
        "stopped": "max_steps",
    }
    assert {name: summary[name] for name in expected} == expected
    assert 10 < summary["peak_memory_mb"] < 100_000
    assert 0 <= summary["wall_seconds"] < 60 and summary["tokens_per_second"] > 0


def test_a_failed_run_has_a_summary_with_the_error(tmp_path: Path, messages: list[str]):
    play([MetricsFile(), Summary()], run_info(tmp_path), range(1, 3), {"error": "loss is NaN", "last": float("nan")})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["error"], summary["last"]) == (2, "loss is NaN", None)
    assert not any(message.startswith("done") for message in messages)


def test_the_last_line_counts_samples_that_were_left_out(tmp_path: Path, messages: list[str]):
    play([MetricsFile(), Summary()], run_info(tmp_path), range(1, 3), {"data": {"dropped": 32, "cut": 0}})
    play([MetricsFile(), Summary()], run_info(tmp_path), range(3, 5), {"data": {"dropped": 0, "cut": 3}})
    play([MetricsFile(), Summary()], run_info(tmp_path), range(5, 7), {"data": {"dropped": 0}})
    ends = [message for message in messages if message.startswith("done")]
    assert [("32 samples dropped" in end, "3 samples cut" in end) for end in ends] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert "samples" not in ends[2]


def test_the_end_of_a_run_that_never_began_raises_nothing(tmp_path: Path):
    for callback in build_callbacks(Config()):
        callback.on_end({"error": "no space"})


def test_plain_lines_come_every_logging_steps_and_for_the_first_and_last_step(tmp_path: Path, messages: list[str]):
    play([ProgressReport(4, disable_bar=False)], run_info(tmp_path), range(1, 11))
    assert messages[0].startswith("training begins: 10 steps, 1.23M parameters")
    assert [message.split()[1] for message in messages[1:]] == ["1/10", "4/10", "8/10", "10/10"]
    assert "loss 1.2500  lr 1.00e-03  200 tokens/s  left 0:00:0" in messages[2]


def test_a_terminal_gets_a_bar_with_loss_rate_and_speed_and_no_lines(tmp_path: Path, messages: list[str]):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    run = run_info(tmp_path, start_step=2)
    play([ProgressReport(1, disable_bar=False, console=console)], run, range(3, 11))
    assert "10/10" in screen.getvalue() and "loss 0.5000  lr 1.00e-03  200 tokens/s" in screen.getvalue()
    assert messages == ["training continues after step 2: 10 steps, 1.23M parameters, into " + str(tmp_path)]
    play([ProgressReport(1, disable_bar=True, console=console)], run, range(3, 11))
    assert len(messages) == 2 + 8


def test_a_log_line_during_the_bar_goes_through_the_bars_console(tmp_path: Path):
    """Else a line would be written over the bar and the bar over the line."""
    code = """
import io, sys
from pathlib import Path
from rich.console import Console
from erniekit.config.schema import Config
from erniekit.training.callbacks import RunInfo
from erniekit.training.reporting.progress import ProgressReport
from erniekit.utils import log
screen = io.StringIO()
report = ProgressReport(1, False, Console(file=screen, force_terminal=True, width=100))
report.on_start(RunInfo(Path("out"), 10, 0, 1, Config()))
log.info("a line between")
report.on_end({})
print("a line between" in screen.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "True"
    assert "a line between" not in done.stderr


def test_evaluations_and_saves_are_said(tmp_path: Path, messages: list[str]):
    report = ProgressReport(1, disable_bar=True)
    report.on_start(run_info(tmp_path))
    report.on_evaluate(5, {"eval_loss": 1.23456, "eval_perplexity": 3.4367})
    report.on_save(5, tmp_path / "checkpoint-5")
    assert messages[1] == "step 5: evaluation: loss 1.235, perplexity 3.437"
    assert messages[2].endswith("checkpoint-5") and "final model" not in messages[2]
    report.on_save(5, run_info(tmp_path).output_dir)
    assert messages[-1].startswith("step 5: saved the final model in ")
    report.on_evaluate(6, {"eval_loss": 2.5, "eval_perplexity": 12.0, "eval_loss_text": 2.0, "eval_loss_image": 3.0})
    assert messages[-1] == "step 6: evaluation: loss 2.5 (text 2.0000, image 3.0000), perplexity 12"


@pytest.mark.parametrize(("number", "shown"), [(999, "999"), (999_400, "999k"), (999_700, "1M"), (1_234_567, "1.23M")])
def test_a_large_number_has_three_digits_and_its_unit(tmp_path: Path, messages: list[str], number: int, shown: str):
    ProgressReport(1, disable_bar=True).on_start(dataclasses.replace(run_info(tmp_path), num_parameters=number))
    assert f", {shown} parameters, " in messages[0]


def test_the_metrics_file_comes_before_those_who_read_it():
    kinds = [type(callback) for callback in build_callbacks(Config())]
    assert kinds == [ProgressReport, MetricsFile, RouterLog, LossPlot, Summary]


def test_reading_leaves_out_what_is_no_record(tmp_path: Path):
    (tmp_path / "m").write_text('{"step": 1}\n\n[1]\n{"loss": 2}\n{"step": 2\n')
    assert list(read_metrics(tmp_path / "m")) == [{"step": 1}]


def test_a_metrics_file_that_is_removed_is_begun_again_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(metrics_file.log, "warning", said.append)
    file = MetricsFile()
    file.on_start(run_info(tmp_path))
    file.on_evaluate(1, {"eval_loss": 1.0})
    (tmp_path / "metrics.jsonl").unlink()
    file.on_evaluate(2, {"eval_loss": 2.0})
    file.on_end({})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    assert len(said) == 1 and "removed or replaced" in said[0]


def test_a_kill_while_later_steps_are_dropped_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 7)))
    before = path.read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile().on_start(run_info(tmp_path, start_step=2))
    assert path.read_bytes() == before


REWARDS = {"reward_margin": 0.25, "reward_accuracy": 0.75, "reward_chosen": 0.1, "reward_rejected": -0.15}


def test_rewards_of_preference_training_are_shown(tmp_path: Path, messages: list[str]):
    report = ProgressReport(1, disable_bar=True)
    report.on_start(run_info(tmp_path))
    report.on_step(step_metrics(1, parts=REWARDS))
    report.on_step(step_metrics(2))
    assert "loss 5.0000  reward margin 0.250  accuracy 75%  lr" in messages[1]
    assert "reward" not in messages[2]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the panels that a test draws."""
    from matplotlib.figure import Figure

    found: list[str] = []

    def look(figure: Figure, path: Path, **options: Any) -> None:
        found.extend(axes.get_ylabel() for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", look)
    return found


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (REWARDS, ["preference loss (mean over pairs)", "reward margin", "learning rate", "reward accuracy"]),
        ({"reward_bad": 0.1}, ["KTO loss (mean over answers)", "learning rate"]),  # a step without a good answer
        ({}, ["loss (nats per token)", "learning rate"]),
    ],
)
def test_the_plot_names_its_loss_and_shows_rewards(tmp_path: Path, labels: list[str], parts: dict, expected: list):
    records = [{"step": step, "loss": 1.0, "learning_rate": 0.1} | parts for step in (1, 2)]
    plot.draw([*records, {"step": 2, "eval_loss": 0.5, "eval_reward_margin": 0.2}], tmp_path / "x.png", "run")
    assert labels == expected


def test_the_plot_of_rewards_has_no_empty_panel(tmp_path: Path, labels: list[str]):
    completions.draw_rewards([{"step": 1, "reward": 0.5, "frac_reward_zero_std": 0.0}], tmp_path / "x.png", "run")
    assert labels == ["reward", "share"]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["输出", "a $\\frac$ b"])
def test_the_name_of_a_run_may_have_any_characters(tmp_path: Path, name: str):
    plot.draw([{"step": 1, "loss": 1.0, "learning_rate": 0.1}], tmp_path / "x.png", name)
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "line", ['{"step": 1, "seconds": {"a": 1}}', '{"step": true}', '{"step": 1, "loss": "x"}', "[" * 100_000]
)
def test_a_line_whose_values_are_no_numbers_is_no_record(tmp_path, line):
    (tmp_path / "m").write_text(line + '\n{"step": 2, "loss": null, "seconds": 0.5}\n')
    assert list(read_metrics(tmp_path / "m")) == [{"step": 2, "loss": None, "seconds": 0.5}]


def test_the_share_of_time_that_a_run_waits_for_data_is_in_the_summary(tmp_path: Path, messages: list[str]):
    """Of both of its processes: steps of 0.5 s, of which the last four waited 0.25 s each."""
    play([MetricsFile(), Summary()], run_info(tmp_path), range(1, 5))
    late = [MetricsFile(), Summary()]
    for callback in late:
        callback.on_start(run_info(tmp_path, start_step=4))
        for step in range(5, 9):
            callback.on_step(step_metrics(step, data_seconds=0.25))
        callback.on_end({})
    assert json.loads((tmp_path / "summary.json").read_text())["data_wait_share"] == 0.2
    assert "20.0% of the step time waiting for data" in messages[-1]


def test_the_patches_of_data_ranks_are_said_once_and_written_every_step(tmp_path: Path, messages: list[str]):
    """A step without pictures says nothing, and neither does one where each rank encodes its own."""
    report, file = ProgressReport(1, disable_bar=True), MetricsFile()
    loads = [None, PatchLoad(), PatchLoad(own=112, divided=72, mean=58.0), PatchLoad(own=60, divided=30, mean=30.0)]
    for callback in (report, file):
        callback.on_start(run_info(tmp_path))
        for step, load in enumerate(loads, 1):
            callback.on_step(step_metrics(step, patch_load=load))
    assert [message for message in messages if "pictures" in message] == [
        "pictures of step 3: the busiest data rank encodes 1.24 times the mean number of patches; without "
        "balance_pictures it would be 1.93 times"
    ]
    names = ("patch_load_max_over_mean", "patch_load_max_over_mean_unbalanced")
    assert [tuple(line.get(name) for name in names) for line in lines(tmp_path)] == [
        (None, None),
        (None, None),
        (72 / 58, 112 / 58),
        (1.0, 2.0),
    ]


def test_losses_of_modalities_are_shown_and_drawn_where_there_are_several(tmp_path: Path, messages: list[str]):
    parts = {"loss_text": 2.0, "loss_image": 3.0}
    callbacks = [ProgressReport(1, True), MetricsFile(), LossPlot()]
    for callback in callbacks:
        callback.on_start(run_info(tmp_path))
    for step in (1, 2):
        for callback in callbacks:
            callback.on_step(step_metrics(step, parts=parts if step == 1 else {"loss_text": 2.5}))
            callback.on_evaluate(step, {"eval_loss": 2.5, "eval_loss_text": 2.0, "eval_loss_image": 3.0})
    for callback in callbacks:
        callback.on_end({})
    shown = [line for line in messages if line.startswith("step ") and "evaluation" not in line]
    assert "(text 2.0000, image 3.0000)" in shown[0] and "(" not in shown[1]
    assert (tmp_path / "loss.png").stat().st_size > 10_000
