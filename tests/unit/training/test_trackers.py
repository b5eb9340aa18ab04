"""report_to: what the boards get, a resumed run's place in them, and what goes wrong. The packages are extras: each
real one is tested where it is installed, without a network.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erniekit.config import Config, load
from erniekit.config.schema_train import BOARDS, TRACKERS
from erniekit.training.callbacks import RunInfo, StepMetrics, build_callbacks
from erniekit.training.reporting import trackers
from erniekit.training.reporting.tracker import TrackedRun
from erniekit.training.reporting.trackers import Board, boards
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, TrainError

PACKAGES = dict(zip(BOARDS, BOARDS, strict=True)) | {"tensorboard": "tensorboardX"}


def run_info(directory: Path, start_step: int = 0, cfg: Config | None = None) -> RunInfo:
    return RunInfo(directory, 10, start_step, 1_234_567, cfg or Config())


def step_metrics(step: int, **parts: float) -> StepMetrics:
    return StepMetrics(step, 5.0 / step, 1.5, 1e-3, 100, 40, 0.5, parts=parts)


class FakeTracker:
    """Stands for a package; `run_id` as told, or a new one."""

    def __init__(self) -> None:
        self.told: list[TrackedRun] = []
        self.written: list[tuple[int, dict[str, float]]] = []
        self.run_id: str | None = None
        self.closed = 0
        self.fails = False

    def open(self, run: TrackedRun) -> Any:
        self.told.append(run)
        self.run_id = run.run_id or f"id-{len(self.told)}"
        return self

    def write(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise OSError("gone")
        self.written.append((step, values))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeTracker]:
    made = {name: FakeTracker() for name in BOARDS}
    for name, fake in made.items():
        monkeypatch.setitem(trackers._OPENERS, name, lambda fake=fake: fake.open)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


def test_each_named_board_gets_every_step_and_evaluation(tmp_path: Path, fakes: dict[str, FakeTracker]):
    cfg = Config(report_to=("wandb", "tensorboard"), run_name="r", project="p")
    found = [callback for callback in build_callbacks(cfg) if isinstance(callback, Board)]
    assert len(found) == 2
    for callback in found:
        callback.on_start(run_info(tmp_path, start_step=3, cfg=cfg))
        callback.on_step(step_metrics(4, lm_loss=1.0))
        callback.on_evaluate(4, {"eval_loss": 2.0})
        callback.on_end({})
    for name in ("wandb", "tensorboard"):
        fake = fakes[name]
        (told,) = fake.told
        assert (told.directory, told.start_step, told.project, told.name) == (str(tmp_path / "runs"), 3, "p", "r")
        (step, values), (at, evaluated) = fake.written
        assert (step, at, evaluated, fake.closed) == (4, 4, {"eval/loss": 2.0}, 1)
        assert (values["train/loss"], values["train/lm_loss"]) == (1.25, 1.0)
    assert not fakes["mlflow"].told


def test_none_is_no_board(fakes: dict[str, FakeTracker]):
    assert not boards(Config()) and not boards(Config(report_to=("none",)))


def test_a_resumed_run_is_the_same_run_there_and_a_new_one_is_not(
    tmp_path: Path, fakes: dict[str, FakeTracker], said: list[str]
):
    cfg = Config(report_to=("wandb", "mlflow"))
    for start in (0, 5, 0):
        for board in boards(cfg):
            board.on_start(run_info(tmp_path, start))
            board.on_end({})
    for name in ("wandb", "mlflow"):
        first, resumed, again = fakes[name].told
        assert (first.run_id, resumed.run_id, again.run_id) == (None, "id-1", None)
        assert first.name == tmp_path.name and first.project == "erniekit"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "id-3", "mlflow": "id-3"}
    assert not said
    (tmp_path / "trackers.json").unlink()
    (board,) = boards(Config(report_to=("wandb",)))
    board.on_start(run_info(tmp_path, 5))
    assert said == ["report_to: wandb: no id of the resumed run in trackers.json: a new run begins there"]


def test_a_board_that_fails_in_mid_run_does_not_end_it(tmp_path: Path, fakes: dict[str, FakeTracker], said: list[str]):
    (board,) = boards(Config(report_to=("wandb",)))
    board.on_start(run_info(tmp_path))
    board.on_step(step_metrics(1))
    fakes["wandb"].fails = True
    for step in (2, 3):
        board.on_step(step_metrics(step))
    board.on_end({})
    assert [step for step, _ in fakes["wandb"].written] == [1]
    assert len(said) == 1 and "gets no more numbers, from step 2 on (OSError: gone)" in said[0]


def test_a_board_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(run: TrackedRun) -> Any:
        raise RuntimeError("no such project")

    monkeypatch.setitem(trackers._OPENERS, "mlflow", lambda: refuse)
    (board,) = boards(Config(report_to=("mlflow",)))
    with pytest.raises(TrainError, match=r"report_to: mlflow cannot start \(RuntimeError: no such project\)"):
        board.on_start(run_info(tmp_path))
    board.on_end({})


@pytest.mark.parametrize("name", BOARDS)
def test_a_missing_package_names_the_extra_before_the_run(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)  # makes the import fail
    with pytest.raises(ConfigError, match=rf"report_to: {name} .*pip install \"erniekit\[{name}\]\""):
        build_callbacks(Config(report_to=(name,)))


def test_secrets_are_neither_kept_nor_sent():
    keys = {"model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "d", "wandb_api_key": "SECRET"}
    cfg = load(None, keys | {"report_to": ["wandb", "trackio"]}, command="train")
    assert cfg.report_to == ("wandb", "trackio")
    assert "SECRET" not in cfg.to_yaml() + str(cfg) + str(trackers.settings_of(cfg)) + str(cfg.notes)
    assert json.dumps(trackers.settings_of(cfg)) and trackers.settings_of(cfg)["train_dataset_path"] == ["d"]


def test_none_beside_another_name_is_refused():
    keys = {"model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "d"}
    with pytest.raises(ConfigError, match="report_to: none, wandb: none goes with no other name"):
        load(None, keys | {"report_to": "none,wandb"}, command="train")


# A run of steps 1 to 3, then one that resumes after step 2, in a process of its own: some packages read their
# environment when they are imported, and start threads.
_PLAY = """
import sys
sys.path.insert(0, "tests/unit/training")
from pathlib import Path
from test_trackers import run_info, step_metrics
from erniekit.config import Config
from erniekit.training.reporting.trackers import boards
name, directory = sys.argv[1], Path(sys.argv[2])
for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    cfg = Config(report_to=(name,), run_name="the-run", project="the-project", learning_rate=0.125)
    (board,) = boards(cfg)
    board.on_start(run_info(directory, start, cfg))
    for step in steps:
        board.on_step(step_metrics(step))
    board.on_evaluate(steps[-1], {"eval_loss": 0.75})
    board.on_end({})
"""


def played(name: str, tmp_path: Path, **environment: str) -> str:
    """Run _PLAY with a package, or skip; what it printed."""
    pytest.importorskip(PACKAGES[name])
    own = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    own |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_SILENT": "true"}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _PLAY, name, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, **own, **environment},
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["tensorboard", "visualdl"])
def test_the_real_board_writes_its_log(tmp_path: Path, out: Path, name: str):
    played(name, tmp_path)
    written = [path for path in (out / "runs").rglob("*") if path.is_file()]
    assert written and b"train/loss" in written[0].read_bytes()


def _records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_wandb_offline(tmp_path: Path, out: Path):
    played("wandb", tmp_path)
    from wandb.proto import wandb_internal_pb2

    files = sorted((out / "runs").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2, "one for each process, of one run"
    losses, settings, runs = [], {}, set()
    for path in files:
        for data in _records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "train/loss" in items:
                    losses.append((int(items["train/step"]), float(items["train/loss"])))
    run_id = json.loads((out / "trackers.json").read_text())["wandb"]
    assert runs == {(run_id, "the-project", "the-run")}
    assert losses == [(1, 5.0), (2, 2.5), (3, 5 / 3), (3, 5 / 3), (4, 1.25)]
    assert settings["learning_rate"] == 0.125


def test_swanlab_offline(tmp_path: Path, out: Path):
    played("swanlab", tmp_path)
    files = sorted((out / "runs").glob("run-*/run-*.swanlab"))
    run_id = json.loads((out / "trackers.json").read_text())["swanlab"]
    assert len(files) == 2 and all(path.stem == f"run-{run_id}" for path in files)
    for path, loss in zip(files, (5.0, 1.25), strict=True):
        data = path.read_bytes()
        assert b"train/loss" in data and b"eval/loss" in data and struct.pack("<d", loss) in data
        assert "learning_rate" in (path.parent / "files" / "config.yaml").read_text()


def test_mlflow_in_a_file(tmp_path: Path, out: Path):
    played("mlflow", tmp_path)
    run_id = json.loads((out / "trackers.json").read_text())["mlflow"]
    with sqlite3.connect(out / "runs" / "mlflow.db") as database:
        runs = database.execute("select run_uuid, name, status from runs").fetchall()
        rows = "select step, value from metrics where key = 'train/loss' order by timestamp, step"
        losses = database.execute(rows).fetchall()
        (rate,) = database.execute("select value from params where key = 'learning_rate'").fetchone()
        (experiment,) = database.execute("select name from experiments where experiment_id != 0").fetchone()
    assert runs == [(run_id, "the-run", "FINISHED")] and experiment == "the-project" and float(rate) == 0.125
    assert sorted(set(losses)) == [(1, 5.0), (2, 2.5), (3, 5 / 3), (4, 1.25)]


def test_trackio_in_its_database(tmp_path: Path, out: Path):
    played("trackio", tmp_path)
    name = json.loads((out / "trackers.json").read_text())["trackio"]
    assert name.startswith("the-run-")
    # Its own reader: the numbers are compressed.
    code = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; p, n = sys.argv[1:]\n"
    code += "print(json.dumps([S.get_runs(p), S.get_logs(p, n), S.get_run_config(p, n)], default=str))"
    done = subprocess.run(
        [sys.executable, "-c", code, "the-project", name],
        capture_output=True,
        text=True,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        timeout=300,
    )
    runs, logs, config = json.loads(done.stdout)
    assert runs == [name]
    losses = [(entry["step"], entry["train/loss"]) for entry in logs if "train/loss" in entry]
    assert losses == [(1, 5.0), (2, 2.5), (3, 5 / 3), (3, 5 / 3), (4, 1.25)]
    assert config["learning_rate"] == 0.125


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_package_without_a_login_is_an_error_before_the_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip(name)
    code = "from erniekit.config import Config\nfrom erniekit.training.reporting.trackers import boards\n"
    code += f"boards(Config(report_to=({name!r},)))\n"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SWANLAB_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | {"HOME": str(tmp_path)}, timeout=300
    )
    assert f"ConfigError: report_to: {name} has no API key. Run `{name} login`" in done.stderr


def test_trackers_are_boards_with_names():
    assert set(TRACKERS) < set(BOARDS) == set(trackers._OPENERS)
