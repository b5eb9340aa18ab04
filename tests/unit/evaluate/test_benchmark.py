"""Multiple-choice benchmarks: files, prompts and scores. The oracle is lm-evaluation-harness, whose numbers are
recorded (support/benchmark_oracle.py; tests/parity/test_lm_eval_live.py asks it again).
"""

import json
import shutil
from pathlib import Path

import pytest
from support.benchmark_oracle import BENCHMARKS, MAX_NEW_TOKENS, RECORDED, benchmark_model

from erniekit.config import Config, load
from erniekit.evaluate import evaluate
from erniekit.evaluate.benchmark import Choice, summarise
from erniekit.evaluate.benchmark_files import ChoiceQuestion, read_split
from erniekit.utils.errors import ConfigError, DataError

# Two float32 implementations that add in different orders; the scores are down to -25.
TOLERANCE = 5e-4
THEIRS = json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_model(tmp_path_factory.mktemp("benchmark") / "model")


def settings(model_dir: Path, tmp_path: Path, benchmark: str = "mmlu", files: str = "", **keys: object) -> Config:
    values: dict[str, object] = {
        "model_name_or_path": str(model_dir),
        "eval_benchmark": benchmark,
        "eval_benchmark_path": str(BENCHMARKS / (files or benchmark)),
        "eval_output": str(tmp_path),
        "compute_type": "fp32",
        "batch_size": 4,
    }
    return load(None, values | keys, command="eval")


def lines_of(directory: Path) -> list[dict[str, object]]:
    text = (directory / "eval_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("case", "files"),
    [*((case, "") for case in THEIRS if "loglikelihood" in case), ("mmlu loglikelihood 0", "mmlu_jsonl")],
)
def test_scores_are_those_of_lm_eval(model_dir: Path, tmp_path: Path, case: str, files: str):
    benchmark, _, shots = case.split()
    theirs = THEIRS[case]
    results = evaluate(settings(model_dir, tmp_path, benchmark, files, num_fewshot=int(shots)))
    assert results["accuracy"] == pytest.approx(theirs["accuracy"])
    assert results["accuracy_stderr"] == pytest.approx(theirs["stderr"])
    assert results["accuracy_macro"] == pytest.approx(theirs["macro"])
    assert list(results["subjects"]) == list(theirs["subjects"])
    for subject, expected in theirs["subjects"].items():
        assert results["subjects"][subject]["accuracy"] == pytest.approx(expected["accuracy"])
        found = [list(line["logprobs"].values()) for line in lines_of(tmp_path) if line["subject"] == subject]
        for ours, answer in zip(found, expected["answers"], strict=True):
            assert ours == pytest.approx(answer, abs=TOLERANCE)


def test_written_answers_are_those_of_lm_eval(model_dir: Path, tmp_path: Path):
    theirs = THEIRS["mmlu generate 2"]
    cfg = settings(model_dir, tmp_path, num_fewshot=2, eval_benchmark_mode="generate", max_new_tokens=MAX_NEW_TOKENS)
    results, lines = evaluate(cfg), lines_of(tmp_path)
    assert results["exact_match"] == pytest.approx(theirs["accuracy"])
    for subject, expected in theirs["subjects"].items():
        found = [str(line["answer"]).strip() for line in lines if line["subject"] == subject]
        assert found == expected["answers"]


def test_results_are_written_and_printed(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = evaluate(settings(model_dir, tmp_path, num_fewshot=1))
    assert json.loads((tmp_path / "eval_results.json").read_text(encoding="utf-8")) == results
    assert (results["num_samples"], results["num_fewshot"], results["num_cut_prompts"]) == (15, 1, 0)
    table = capsys.readouterr().out
    assert "formal_logic" in table and f"{results['accuracy_macro']:.2%}" in table
    first = lines_of(tmp_path)[0]
    assert first["source"] == f"{BENCHMARKS}/mmlu/test/elementary_mathematics_test.csv:1"
    assert first["reference"] == "A" and first["correct"] == (first["prediction"] == "A")


def test_a_line_break_in_a_question_does_not_move_the_numbers_of_lines():
    questions = [q for q in read_split(BENCHMARKS / "mmlu", "test", "key") if q.subject == "formal_logic"]
    assert "\n" in questions[5].question and questions[5].where.endswith(":6")


def test_a_conversation_has_a_turn_for_each_example(model_dir: Path, tmp_path: Path):
    written = {"num_fewshot": 2, "eval_benchmark_mode": "generate", "max_new_tokens": 4}
    plain = evaluate(settings(model_dir, tmp_path, **written))
    chat = evaluate(settings(model_dir, tmp_path, eval_chat_template=True, **written))
    assert (plain["chat_template"], chat["chat_template"]) == (None, "text")
    scored = evaluate(settings(model_dir, tmp_path, num_fewshot=2, eval_chat_template=True))
    assert len({line["prediction"] for line in lines_of(tmp_path)}) > 1, "letters of one token each: the model varies"
    assert scored["accuracy"] == sum(bool(line["correct"]) for line in lines_of(tmp_path)) / 15


def test_cut_prompts_are_counted(tmp_path: Path, model_dir: Path):
    small = shutil.copytree(model_dir, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    results = evaluate(settings(small, tmp_path / "out", num_fewshot=1))
    assert results["num_cut_prompts"] == 15


def choice(subject: str, chosen: int) -> Choice:
    return Choice(ChoiceQuestion(subject, "q", ("a", "b", "c", "d"), 1, "f:1"), chosen)


def test_micro_and_macro_averages_differ_where_subjects_do():
    choices = [choice("large", 1), choice("large", 1), choice("large", 1), choice("large", 0), choice("small", 0)]
    results = summarise(choices, False)
    assert (results["accuracy"], results["accuracy_macro"]) == (pytest.approx(3 / 5), pytest.approx(3 / 8))
    # The sample variance of (1, 1, 1, 0) is 1/4; that of a single question has no degree of freedom.
    assert results["subjects"]["large"]["accuracy_stderr"] == pytest.approx((1 / 4 / 4) ** 0.5)
    assert results["subjects"]["small"]["accuracy_stderr"] is None
    assert results["accuracy_stderr"] == pytest.approx((1 / 4 / 5) ** 0.5)


HEADER = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("val/law_val.csv", HEADER + "0,q,1,2,3,4,E\n", r"law_val.csv:2: answer: expected A, B, C or D.*'E'"),
        ("val/law_val.csv", HEADER + "0,q,1,2,3,4,\n", r":2: answer: missing. Hint: C-Eval publishes no answers"),
        ("val/law_val.csv", HEADER + '0,"a\nb",1,2,3,4,A\n1,q,1,2,3,A\n', r":4: 6 columns instead of 7"),
        ("val/law_val.csv", HEADER + '0,"q,1,2\n', r":2: not csv from here on"),
        ("val/law_val.csv", "a,b\n", r":1: expected a header with question, a, b, c, d, answer"),
        ("val/law_val.csv", HEADER + "0,,1,2,3,4,A\n", r":2: question: empty"),
        ("val/law_val.csv", HEADER, r"have no questions"),
        ("law/val.jsonl", '{"question": "q", "choices": ["1", "2"], "answer": 0}\n', r"val.jsonl:1: choices: expected"),
        ("law/val.jsonl", '{"question": "q", "A": "1", "B": "2", "C": 3, "D": "4", "answer": 0}\n', r":1: C: expected"),
        ("law/val.jsonl", '\n{"question": "q"\n', r"val.jsonl:2: "),
        ("law/val.jsonl", "[1]\n", r"val.jsonl:1: expected an object, got a list"),
        ("law/val.jsonl", '{"question": "q", "choices": ["1","2","3","4"], "answer": 4}\n', r"expected .*got 4"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, name: str, text: str, says: str):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        read_split(tmp_path, "val", "eval_benchmark_path")


def test_several_bad_lines_are_counted(tmp_path: Path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "law.csv").write_text(HEADER + "0,q,1,2,3,4,X\n" * 7)
    with pytest.raises(DataError, match=r"law.csv:6: .*\nand 2 more"):
        read_split(tmp_path, "val", "eval_benchmark_path")


def test_missing_files_and_examples_are_named(model_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"eval_benchmark_path: .* is not a directory"):
        evaluate(settings(model_dir, tmp_path, eval_benchmark_path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"no .csv or .jsonl file of the split val"):
        evaluate(settings(model_dir, tmp_path, "ceval", "cmmlu"))
    with pytest.raises(ConfigError, match=r"num_fewshot: 6, and the split dev of elementary_mathematics .* has 5"):
        evaluate(settings(model_dir, tmp_path, num_fewshot=6))
    with pytest.raises(ConfigError, match=r"eval_benchmark_path: needed with eval_benchmark: mmlu"):
        load(None, {"model_name_or_path": "m", "eval_benchmark": "mmlu", "eval_output": "o"}, command="eval")


def test_keys_that_a_benchmark_makes_pointless_are_named(model_dir: Path, tmp_path: Path):
    cfg = settings(model_dir, tmp_path, eval_dataset_path="d.jsonl", top_p=0.5, on_bad_line="skip")
    notes = "\n".join(cfg.notes)
    assert "eval_dataset_path: no effect: eval_benchmark: mmlu is evaluated instead" in notes
    assert "top_p: no effect: eval_benchmark_mode: loglikelihood generates no text" in notes
    assert "on_bad_line: no effect: a benchmark is scored with all its questions" in notes
