"""`profile: true`, as a user has it: the files, what is in them, and that it changes no result."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from support.equality import keys_for, prepare

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.training import run as training
from erniekit.training import trainer
from erniekit.training.profiling import against_plan, picture, report
from erniekit.training.profiling.recorder import Interval
from erniekit.training.profiling.report import KINDS, Profile, RankTimes
from erniekit.utils import spans
from erniekit.utils.errors import ConfigError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    prepare(path)
    return path


def train(directory: Path, output: Path, **keys: Any) -> list[dict[str, Any]]:
    more = {"profile": True, "max_steps": 3, "save_strategy": "no", "output_dir": str(output), "profile_step_start": 2}
    cfg = config.load(None, keys_for(str(directory), "moe", rows=4, **(more | {"profile_step_end": 3} | keys)), "train")
    return training.train(cfg).history


def events_of(output: Path) -> list[dict[str, Any]]:
    trace = json.loads((output / "profile.json").read_text())
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def nobody_listens() -> bool:
    return isinstance(spans.span("any"), contextlib.nullcontext)


def test_a_profile_names_the_parts_and_adds_up(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    history = train(directory, tmp_path / "out", recompute=True, num_nextn_predict_layers=1)
    table = (tmp_path / "out" / "profile.txt").read_text()
    parts = {"attention", "attention projections", "norm", "experts", "shared experts", "router", "feed-forward"}
    parts |= {"embedding", "head and loss", "optimizer, clipping", "waiting for data", "inputs: positions, masks"}
    named = {line[: line.find("  ")].strip() for line in table.splitlines() if "  " in line}
    assert parts <= named
    assert "MFU counting the causal half" in table and "tokens/s" in table and "MiB by the plan" in table
    assert table in capsys.readouterr().err
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    rows: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for event in events_of(tmp_path / "out"):
        rows[event["tid"]].append(event)
    assert {event["cat"] for event in rows[1]} == set(KINDS) - {"communication"}
    measured = sum(step["seconds"] + step["data_seconds"] for step in history[1:3])
    for events in rows.values():
        for before, after in itertools.pairwise(events):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=0.01)
        # Another program may take the processor between the two clocks' readings.
        assert 0.5 * measured < sum(event["dur"] for event in events) / 1e6 < 1.15 * measured
    # Each layer's attention in every pass: forward, again, and backward.
    for phase in ("forward", "recompute", "backward"):
        names = {event["name"] for event in rows[1] if event["args"]["phase"] == phase}
        assert {f"attention {layer}" for layer in range(4)} <= names, phase


def test_a_profile_changes_nothing_and_leaves_nothing(directory: Path, tmp_path: Path):
    with_profile = train(directory, tmp_path / "with")
    assert nobody_listens()
    without = train(directory, tmp_path / "without", profile=False)
    for one, other in zip(with_profile, without, strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert not list((tmp_path / "without").glob("profile.*"))


def test_after_an_error_nobody_listens(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        assert not nobody_listens()
        raise RuntimeError("in a measured step")

    monkeypatch.setattr(trainer, "clip_", fail)
    with pytest.raises(RuntimeError, match="in a measured step"):
        train(directory, tmp_path / "out", profile_step_start=1)
    assert nobody_listens()


def test_a_run_that_ends_too_soon_says_so(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(directory, tmp_path / "out", profile_step_start=7, profile_step_end=9)
    said = capsys.readouterr().err
    assert "the run ended before step 7: nothing was measured" in said
    assert said.index("profile: no effect: 3 steps are left to train") < said.index("training begins")
    assert not (tmp_path / "out" / "profile.txt").exists()


def test_a_run_that_ends_within_is_measured_to_its_end(directory: Path, tmp_path: Path):
    train(directory, tmp_path / "out", profile_step_end=9)
    assert "mean of 2 steps" in (tmp_path / "out" / "profile.txt").read_text()


def test_steps_in_the_wrong_order_are_refused(directory: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="profile_step_start: 2 is after profile_step_end: 1"):
        train(directory, tmp_path / "out", profile_step_end=1)


def two_ranks(on_device: bool = False) -> Profile:
    """A forward pass of 3 s and a collective of 1 s on one rank, 2 s and 2 s on the other; two steps."""
    ranks = []
    for rank, busy in enumerate((3.0, 2.0)):
        parts = [
            Interval("data", -1, "data", 0.0, 0.0, 0.0),
            Interval("attention", 0, "forward", 0.0, busy, 0.5),
            Interval("all_reduce", -1, "communication", busy, 4.0 - busy, 0.1),
        ]
        ranks.append(RankTimes(rank, 100.0, parts, (rank + 1) << 20, {}))
    return Profile(ranks, [50, 70], on_device)


def test_a_table_is_of_a_step_and_the_mean_of_the_ranks():
    profile = two_ranks()
    assert [RankTimes.from_json(json.loads(json.dumps(rank.to_json()))) for rank in profile.ranks] == profile.ranks
    assert report.by_part(profile)["attention"] == {"forward": 1.25}
    assert report.by_part(profile)["communication: all_reduce"] == {"communication": 0.75}
    assert [report.by_rank(profile)[rank]["forward"] for rank in (0, 1)] == [1.5, 1.0]
    assert report.summary(profile)[0].startswith("step: 2000.0 ms, 60 tokens, 30 tokens/s; measured on a CPU")
    assert "GPU" in report.summary(two_ranks(on_device=True))[0]


def test_ranks_are_processes_of_the_trace(tmp_path: Path):
    events = json.loads(report.trace(two_ranks()))["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0", "rank 1"}
    picture.draw(two_ranks(), tmp_path / "p.png", "two ranks")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_a_cards_name_is_found_in_what_the_driver_calls_it():
    assert against_plan.card_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert against_plan.card_of("cpu").name == "CPU"
    with pytest.raises(ConfigError, match="not in the hardware table"):
        against_plan.card_of("Unheard-of 9000")


def test_utilisation_is_measured_flops_over_the_peak(directory: Path):
    cfg = config.load(None, keys_for(str(directory), "moe", rows=4), "train")
    model = ModelConfig.from_dir(directory / "moe")
    slow, fast = (against_plan.lines(cfg, model, 1, "NVIDIA H100", speed, 3 << 20) for speed in (1e6, 2e6))
    shares = [float(found[0].split(" = ")[1].split("%")[0]) for found in (slow, fast)]
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.2) and "peak 67 TFLOP/s" in slow[0]
    assert "3.0 MiB measured" in slow[2]
    assert against_plan.lines(cfg, model, 1, "Unheard-of 9000", 1.0, 1)[0].startswith("no plan for this device")
    line = against_plan.launch_line(cfg, model, 1)
    assert line.startswith("by formula, not measured: a rank's 2 microbatches") and "not counted" not in line
    more = config.load(None, keys_for(str(directory), "moe", fine_tuning="LoRA", continue_training=True), "train")
    assert against_plan.launch_line(more, model, 2).endswith("; not counted: adapters, what ranks send")
