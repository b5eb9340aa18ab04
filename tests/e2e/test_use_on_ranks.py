"""`erniekit eval` and `chat` start the ranks that the YAML asks for, and leave none behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_job
from support.launched import workers
from support.terminal import Terminal
from support.tiny_directories import model_directory, write_lines

TENSOR2 = "tensor_parallel_degree=2"
ENVIRON = {**os.environ, "ERNIEKIT_NUM_THREADS": "1"}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A model, questions, and a YAML of both."""
    model_directory(tmp_path / "model")
    write_lines(tmp_path / "eval.jsonl", [{"src": [f"{a}+1=?"], "tgt": [str(a + 1)]} for a in range(5)])
    (tmp_path / "use.yaml").write_text(
        f"""
model_name_or_path: {tmp_path}/model
eval_dataset_path: {tmp_path}/eval.jsonl
eval_dataset_type: erniekit
eval_output: {tmp_path}/results
output_dir: {tmp_path}/out
compute_type: fp32
batch_size: 2
max_seq_len: 64
max_new_tokens: 8
predict_with_generate: true
disable_tqdm: true
seed: 3
"""
    )
    return tmp_path


def command(workspace: Path, name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "erniekit", name, str(workspace / "use.yaml"), *words]


def run(workspace: Path, name: str, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workspace, name, *words), input=typed, capture_output=True, text=True, env=ENVIRON, timeout=240
    )


def test_eval_on_two_ranks_reports_once_what_one_process_does(workspace: Path):
    done = run(workspace, "eval", TENSOR2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1 and "ranks 0 to 1 of 2" in done.stderr
    assert (workspace / "results" / "logs" / "eval" / "rank-1.log").is_file()
    found = [json.loads((workspace / "results" / "eval_results.json").read_text())]
    answers = [(workspace / "results" / "eval_predictions.jsonl").read_bytes()]
    assert run(workspace, "eval").returncode == 0
    found.append(json.loads((workspace / "results" / "eval_results.json").read_text()))
    answers.append((workspace / "results" / "eval_predictions.jsonl").read_bytes())
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5) and answers[0] == answers[1]


def test_a_mistake_is_said_once_and_ends_all_ranks(workspace: Path):
    done = run(workspace, "eval", TENSOR2, f"eval_dataset_path={workspace}/nowhere.jsonl")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "nowhere.jsonl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["eval", "chat"])
def test_degrees_that_do_not_fit_the_model_are_refused_before_a_process_starts(workspace: Path, name: str):
    done = run(workspace, name, "tensor_parallel_degree=3")
    assert done.returncode == 1 and "tensor_parallel_degree: 3 does not divide" in done.stderr
    assert "ranks 0 to" not in done.stderr


def test_chat_through_a_pipe_gives_the_answers_of_one_process(workspace: Path):
    talks = [run(workspace, "chat", *words, typed="hi\nagain?\n") for words in ((TENSOR2,), ())]
    assert [talk.returncode for talk in talks] == [0, 0], talks
    assert talks[0].stdout == talks[1].stdout and talks[0].stdout.count("\n") >= 2


@pytest.mark.slow
def test_a_question_that_does_not_fit_ends_a_piped_chat(workspace: Path):
    done = run(workspace, "chat", TENSOR2, typed="hi\n" + "word " * 9000 + "\n")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "context is 4096 tokens" in done.stderr


@pytest.fixture
def screen(workspace: Path) -> Iterator[Terminal]:
    terminal = Terminal(command(workspace, "chat", TENSOR2, "max_new_tokens=3000", "min_tokens=3000"))
    yield terminal
    left = workers(terminal)
    terminal.kill()
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)


def test_ctrl_c_stops_an_answer_on_all_ranks_and_the_talk_goes_on(screen: Terminal):
    screen.expect("User: ")
    ranks = workers(screen)
    assert sorted(ranks) == [0, 1]
    for _ in range(2):
        screen.type("hi\n")
        screen.expect("Assistant: ")
        time.sleep(0.5)
        screen.type("\x03")
        screen.expect("stopped")
        screen.expect("User: ")
    screen.type("exit\n")
    assert screen.exit_code() == 0
    fake_job.assert_gone(ranks.values())


@pytest.mark.slow
def test_the_end_of_the_terminal_ends_all_ranks(screen: Terminal):
    screen.expect("User: ")
    ranks = workers(screen)
    screen.type("\x04")
    assert screen.exit_code() == 0
    fake_job.assert_gone(ranks.values())


@pytest.mark.slow
def test_ctrl_c_while_the_model_is_loaded(screen: Terminal):
    screen.expect("ranks 0 to 1 of 2")
    ranks = workers(screen)
    time.sleep(0.5)
    screen.type("\x03")
    screen.expect("interrupted")
    assert screen.exit_code() == 130
    fake_job.assert_gone(ranks.values())


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_talk(screen: Terminal):
    screen.expect("User: ")
    ranks = workers(screen)
    os.kill(ranks[1], signal.SIGKILL)
    screen.expect("rank 1 was killed by SIGKILL")
    assert screen.exit_code() == 1
    fake_job.assert_gone(ranks.values())


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2])
def test_a_scheduler_that_ends_an_evaluation(workspace: Path, degree: int):
    words = (f"tensor_parallel_degree={degree}", "max_new_tokens=4000", "min_tokens=4000")
    process = subprocess.Popen(
        command(workspace, "eval", *words), stderr=subprocess.PIPE, text=True, env=ENVIRON, start_new_session=True
    )
    time.sleep(4)
    ranks = workers(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said and "Traceback" not in said
    fake_job.assert_gone(ranks.values())
