"""Runs of the board: started, stopped, killed and found again by what is in their files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

from erniekit.board import job
from erniekit.board import runs as module
from erniekit.board.runs import MAX_LOG, MAX_RECORDS, Run, Runs
from erniekit.serve.server_responses import json_response
from erniekit.utils.errors import ConfigError, UserError

# A stand-in for a training: it says that it has begun, and what SIGTERM makes it do.
SCRIPT = """
import signal, sys, time
def end(number, frame):
    print("saved", flush=True); sys.exit(0 if "saves" in sys.argv[-1] else 143)
signal.signal(signal.SIGTERM, end)
print("begun", sys.argv[1:], flush=True)
if "quick" in sys.argv[-1]:
    sys.exit(int(sys.argv[-1].rpartition("quick")[2]))
time.sleep(60)
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "cli", lambda *words: (sys.executable, "-c", SCRIPT, *words))
    runs = Runs(tmp_path / "runs")
    runs.open()
    yield runs
    for run in runs.list():
        if run.pid():
            runs.stop(run, force=True)
    runs.close()


def start(runs: Runs, name: str, word: str = "x") -> Run:
    directory = runs.new_directory(name)
    return runs.create(directory, "a: 1\n", ("train", word), directory / "output")


def wait(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def says(run: Run, text: str):
    return lambda: text in run.log(0)["text"]


def test_a_run_keeps_its_log_and_exit_code_and_is_found_by_a_later_board(runs: Runs):
    done, failed = start(runs, "done", "quick0"), start(runs, "failed", "quick1")
    running = start(runs, "running")
    wait(says(running, "begun ['train', 'x']"))
    wait(lambda: done.state()["state"] != "running" and failed.state()["state"] != "running")
    again = Runs(runs.root)  # as after the board was killed: nothing but the files
    states = {run.id: run.state() for run in again.list()}
    assert [states[name]["state"] for name in ("done", "failed", "running")] == ["done", "failed", "running"]
    assert states["failed"]["code"] == 1 and again.get("done").facts()["words"] == "erniekit train quick0"
    assert os.getsid(running.pid()) == running.pid() != os.getsid(0), "it has a session of its own"
    again.stop(again.get("running"), force=False)
    wait(lambda: running.state()["state"] == "stopped")
    assert "saved" in running.log(0)["text"] and running.state()["code"] == 143
    with pytest.raises(UserError, match="does not run"):
        runs.stop(running, force=False)
    saves = start(runs, "saves", "saves")  # as a training does
    wait(says(saves, "begun"))
    runs.stop(saves, force=False)
    wait(lambda: saves.state()["state"] == "stopped")
    assert saves.state()["code"] == 0, "it can be resumed, unlike one that is done"


def test_a_killed_run_has_no_exit_code_and_can_be_started_again(runs: Runs):
    run = start(runs, "a")
    wait(says(run, "begun"))
    with pytest.raises(UserError, match="runs already"):
        runs.start(run)
    children = Path(f"/proc/{run.pid()}/task/{run.pid()}/children").read_text().split()
    runs.stop(run, force=True)
    wait(lambda: run.state() == {"state": "killed"})
    wait(lambda: all(job.start_time(int(child)) is None for child in children))
    runs.start(run)
    assert run.state() == {"state": "running"}
    wait(lambda: run.log(0)["text"].count("begun") == 2)


def test_the_address_of_a_server_is_that_of_its_present_process(runs: Runs, monkeypatch):
    """Each start has a free port of its own and adds to the log; another program may have the old port."""
    ports = "import sys, time, pathlib; p = pathlib.Path('n'); n = int(p.read_text()) if p.exists() else 1\n"
    ports += "p.write_text(str(n + 1)); time.sleep(0.3)\n"
    ports += "name = 'm is served at http://127.0.0.1:7/v1 (' if n == 1 else 'm is served at http://10.0.0.1:7/v1 ('\n"
    ports += "print(f'[erniekit] {name} is served at http://127.0.0.1:{n}/v1 (x)', flush=True); time.sleep(60)"
    monkeypatch.setattr(module, "cli", lambda *words: (sys.executable, "-c", ports))
    run = runs.create(runs.new_directory("s"), "a: 1\n", ("server", "x"), runs.root)
    wait(lambda: run.address() == "http://127.0.0.1:1")
    runs.stop(run, force=True)
    wait(lambda: run.pid() is None and run.address() is None)
    runs.start(run)
    assert run.address() is None, "it is not served yet"
    wait(lambda: run.address() is not None)
    assert run.address() == "http://127.0.0.1:2"


def test_a_process_that_got_the_number_of_a_run_is_not_that_run(runs: Runs):
    run = start(runs, "a", "quick0")
    wait(lambda: run.state()["state"] == "done")
    (run.directory / job.EXIT).unlink()
    (run.directory / job.PROCESS).write_text(json.dumps({"pid": os.getpid(), "started": "1"}))
    assert run.pid() is None and run.state() == {"state": "killed"}
    (run.directory / job.PROCESS).write_text("half a fi")
    assert run.pid() is None


def test_names_stay_below_the_root(runs: Runs, tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "job.json").write_text(json.dumps({"words": ["train"], "output": "/", "created": 0}))
    (runs.root / "link").symlink_to(tmp_path / "outside")
    for name in ("../outside", "link", "..", "", "a/b", "/etc", "a\0b", "x" * 100):
        with pytest.raises(UserError):
            runs.get(name)
    for name in ("../outside", "", ".hidden", "a/b", "a b", "x" * 65, "-c"):
        with pytest.raises(UserError, match="expected letters"):
            runs.new_directory(name)
    start(runs, "a", "quick0")
    assert runs.new_directory("a").name == "a-2" and [run.id for run in runs.list()] == ["a"]
    (tmp_path / "inside").symlink_to("/etc")
    allowed = {
        path: runs.is_below(path) for path in ("data.jsonl", "runs/x", "../x", "/etc/passwd", "inside/passwd", "~")
    }
    assert allowed == dict.fromkeys(("data.jsonl", "runs/x"), True) | dict.fromkeys(
        ("../x", "/etc/passwd", "inside/passwd", "~"), False
    )


def test_a_root_belongs_to_one_board(runs: Runs):
    code = "import sys; from pathlib import Path; from erniekit.board.runs import Runs; Runs(Path(sys.argv[1])).open()"
    command = [sys.executable, "-c", code, str(runs.root)]
    second = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert second.returncode and f"is in use by process {os.getpid()}" in second.stderr
    with pytest.raises(ConfigError, match=r"runs: .* in use"):
        Runs(runs.root).open()


def test_a_root_of_another_user_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 123456)
    with pytest.raises(ConfigError, match="belongs to another user"):
        Runs(tmp_path).open()


def write(run: Run, records: list[object], mode: str = "a") -> None:
    run.metrics_file.parent.mkdir(exist_ok=True)
    with open(run.metrics_file, mode) as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)


def test_metrics_come_in_whole_lines_from_a_mark_on(runs: Runs):
    run = start(runs, "a", "quick0")
    assert run.metrics("") == {"mark": "", "records": [], "restart": False, "every": 1}
    write(run, [{"step": 1, "loss": 2.0, "text": "<b>"}, {"step": 1, "eval_loss": 1.5}, ["no record"], {"loss": 3}])
    first = run.metrics("")
    assert first["records"] == [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.5}] and first["restart"]
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    second = run.metrics(first["mark"])
    assert second["records"] == [{"step": 2, "loss": None}] and not second["restart"]
    with open(run.metrics_file, "a") as file:
        file.write('ss": 1}\n')
    assert run.metrics(second["mark"])["records"] == [{"step": 3, "loss": 1}]
    assert run.facts()["last"] == {"step": 3, "loss": 1, "eval_loss": 1.5}
    os.replace(run.metrics_file, run.metrics_file.with_name("old"))  # as a resumed run does, which drops later steps
    write(run, [{"step": 1, "loss": 2.0}] * 50)
    third = run.metrics(second["mark"])
    assert third["restart"] and len(third["records"]) == 50
    for mark in ("x", "1:2", f"{third['mark']}9999", ":", "-1:-1"):
        assert run.metrics(mark)["restart"]


def test_long_metrics_are_thinned_and_evaluations_kept(runs: Runs):
    run = start(runs, "a", "quick0")
    write(run, [{"step": n, "loss": 1.0} for n in range(3 * MAX_RECORDS)] + [{"step": 7, "eval_loss": 1.0}])
    said = run.metrics("")
    assert (
        said["every"] == 4 and len(said["records"]) == 3 * MAX_RECORDS // 4 + 1 and "eval_loss" in said["records"][-1]
    )


def test_a_log_comes_from_an_offset_on_and_half_a_character_waits(runs: Runs):
    run = start(runs, "a", "quick0")
    wait(lambda: run.state()["state"] == "done")
    log = run.directory / job.LOG
    log.write_bytes("一二".encode()[:4])
    assert run.log(0) == {"text": "一", "offset": 3, "skipped": 0}
    log.write_bytes("一二\n".encode())
    assert run.log(3) == {"text": "二\n", "offset": 7, "skipped": 0}
    log.write_bytes(b"a" * (MAX_LOG + 10))
    assert run.log(0)["skipped"] == 10 and len(run.log(0)["text"]) == MAX_LOG
    log.write_bytes(b"new")
    assert run.log(7)["text"] == "new", "the file is another one"


def test_a_run_that_something_else_started_is_shown(runs: Runs):
    directory = runs.root / "by-hand"
    directory.mkdir()
    write(Run(directory, (), directory), [{"step": 1, "loss": 2.0}])
    facts = runs.get("by-hand").facts()
    assert facts["state"] == "other" and facts["last"] == {"step": 1, "loss": 2.0} and facts["words"] == ""
    (directory / "config.yaml").write_text("seed: 1\n")
    os.utime(directory / "config.yaml", (1000, 1000))
    assert runs.get("by-hand").created == 1000, "a training writes it as it starts"
    with pytest.raises(UserError):
        runs.start(runs.get("by-hand"))


def test_one_broken_run_hides_no_other(runs: Runs):
    """Files that were damaged, or that another program wrote under these names."""
    good = start(runs, "good", "quick0")
    facts = {"words": ["train", "x"], "output": str(runs.root / "o"), "created": 1}
    for n, job_file in enumerate(
        ({"a": 1}, {"words": "train", "output": 5}, facts | {"words": []}, facts | {"created": ""})
    ):
        (runs.root / f"job{n}").mkdir()
        (runs.root / f"job{n}" / "job.json").write_text(json.dumps(job_file))
    for name in ("process", "exit"):
        (runs.root / name).mkdir()
        (runs.root / name / "job.json").write_text(json.dumps(facts))
        (runs.root / name / f"{name}.json").write_text('{"pid": 1}')
    os.mkfifo(runs.root / "job0" / "metrics.jsonl")
    assert {run.id: run.facts()["state"] for run in runs.list() if run != good} == {
        "process": "killed",
        "exit": "killed",
    }


def test_numbers_that_json_lacks_and_odd_texts_do_not_end_the_page_of_a_run(runs: Runs):
    run = start(runs, "a", "quick0")
    write(run, [])
    run.metrics_file.write_text('{"step": 1, "loss": 1e999}\n{"step": 2, "loss": -Infinity}\n')
    rows = [{"text": "a\u2028b"}, {"text": "c\x85d"}, {"text": "\ud800"}]
    lines = [json.dumps(row, ensure_ascii="\ud800" in row["text"]) for row in rows]
    (run.output / "samples.jsonl").write_text("\n".join([*lines, '{"reward": 1e999}']), encoding="utf-8")
    assert run.metrics("")["records"] == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert run.table("samples.jsonl") == [*rows, {"reward": None}]
    assert b"?" in json_response(run.table("samples.jsonl")).body
