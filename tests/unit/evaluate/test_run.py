"""`evaluate` measures the model that the configuration names, and writes what it found."""

import contextlib
import errno
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_directories import model_directory, write_lines

from erniekit.build import load_model
from erniekit.config import Config, load
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.evaluate import evaluate
from erniekit.evaluate.run import print_table
from erniekit.utils.errors import CheckpointError, ConfigError, DataError, EvaluationError, UserError

QUESTIONS = ["25加16等于几？", "Sort ascending: 35 28 1", "三千零二十一写成数字", "What is 4 plus 15?", "6加14等于几？"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    return caplog


def samples(answers: list[str]) -> list[dict[str, object]]:
    return [{"src": [question], "tgt": [answer]} for question, answer in zip(QUESTIONS, answers, strict=True)]


def settings(model_dir: Path, tmp_path: Path, records: list[dict[str, object]], **keys: object) -> Config:
    """An `eval` configuration on these records."""
    data = write_lines(tmp_path / "eval.jsonl", records)
    values: dict[str, object] = {
        "model_name_or_path": str(model_dir),
        "eval_dataset_path": str(data),
        "output_dir": str(tmp_path / "output"),
        "max_seq_len": 256,
        "compute_type": "fp32",
        "max_new_tokens": 6,
    }
    return load(None, values | keys, command="eval")


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_loss_perplexity_and_accuracy_are_those_of_the_samples_alone(model_dir: Path, tmp_path: Path, packing: bool):
    records = [{"system": "Answer.", "src": ["a", "b"], "tgt": ["one", "two"]}, *samples(list("xyzuv"))]
    cfg = settings(model_dir, tmp_path, records, packing=packing, batch_size=2)
    results = evaluate(cfg)
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    template = load_template(tokenizer)
    nll: list[float] = []
    right: list[bool] = []
    for record in records:
        system = [{"role": "system", "content": record["system"]}] if "system" in record else []
        turns = [
            {"role": role, "content": text}
            for pair in zip(record["src"], record["tgt"], strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        ids, labels = template.labels(template.encode([*system, *turns]))
        logits = model(np.array([ids])).numpy()[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for at, label in enumerate(labels):
            if label != -100:
                nll.append(-log_p[at, label])
                right.append(int(logits[at].argmax()) == label)
    assert results["num_samples"] == 6
    assert results["num_tokens"] == len(nll)
    assert results["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert results["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert results["token_accuracy"] == pytest.approx(np.mean(right))
    assert "exact_match" not in results
    written = json.loads((tmp_path / "output" / "eval_results.json").read_text(encoding="utf-8"))
    assert written == results


def test_samples_that_are_cut_are_counted(model_dir: Path, tmp_path: Path, heard: pytest.LogCaptureFixture):
    two_turns = {"src": ["what is this?" * 3, "b"], "tgt": ["one", "two"]}
    results = evaluate(settings(model_dir, tmp_path, [two_turns, {"src": ["a"], "tgt": ["x"]}], max_seq_len=24))
    assert (results["num_samples"], results["num_dropped"], results["num_cut"]) == (2, 0, 1)
    assert "eval data: 1 sample cut at max_seq_len: 24, so that a part was not read" in heard.text


def test_answers_are_scored_and_kept(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = settings(model_dir, tmp_path, samples(["?"] * 5), predict_with_generate=True)
    evaluate(first)
    own = [str(line["prediction"]) for line in read(tmp_path / "output" / "eval_predictions.jsonl")]
    assert len(set(own)) == 5 and all(text.strip() for text in own), "the test needs different, visible answers"
    capsys.readouterr()

    # Three answers as the model gives them, one but for its ends, one wrong.
    expected = [own[0], own[1], own[2] + " ", "wrong", own[4]]
    results = evaluate(settings(model_dir, tmp_path, samples(expected), predict_with_generate=True))
    assert results["exact_match"] == results["accuracy"] == pytest.approx(4 / 5)
    assert results["num_answers"] == results["num_labels"] == 5
    assert results["macro_f1"] == pytest.approx(4 / 5)
    assert 0.5 < results["rouge_l"] < 1
    assert 50 < results["bleu"] < 100
    lines = read(tmp_path / "output" / "eval_predictions.jsonl")
    assert [line["prediction"] for line in lines] == own
    assert [line["reference"].strip() for line in lines] == [text.strip() for text in expected]
    assert [line["exact_match"] for line in lines] == [True, True, True, False, True]
    assert lines[3]["source"] == f"{tmp_path / 'eval.jsonl'}:4"
    assert lines[3]["prompt"] == f"<|begin_of_sentence|>User: {QUESTIONS[3]}\nAssistant: "
    table = capsys.readouterr().out
    assert "exact match" in table and "80.00%" in table


def test_the_last_question_is_asked_with_what_came_before(model_dir: Path, tmp_path: Path):
    record = {"system": "Be short.", "src": ["1?", "2?"], "tgt": ["one", "two"]}
    evaluate(settings(model_dir, tmp_path, [record], predict_with_generate=True))
    (line,) = read(tmp_path / "output" / "eval_predictions.jsonl")
    assert line["prompt"].endswith("Be short.\nUser: 1?\nAssistant: one<|end_of_sentence|>User: 2?\nAssistant: ")
    assert line["reference"] == "two"


def test_answers_are_greedy_unless_a_temperature_is_given(model_dir: Path, tmp_path: Path):
    def answers(**keys: object) -> list[object]:
        evaluate(settings(model_dir, tmp_path, samples(["?"] * 5), predict_with_generate=True, **keys))
        return [line["prediction"] for line in read(tmp_path / "output" / "eval_predictions.jsonl")]

    greedy = answers()
    assert answers(temperature=0, seed=1) == greedy
    drawn = answers(temperature=2.0, top_p=1.0, seed=1)
    assert drawn == answers(temperature=2.0, top_p=1.0, seed=1) != greedy
    assert drawn != answers(temperature=2.0, top_p=1.0, seed=2)


def test_a_thought_is_not_part_of_the_answer(model_dir: Path, tmp_path: Path):
    records = [{"src": ["1+1?"], "tgt": ["<think>\nadd\n</think>\n\n2"]}]
    cfg = settings(model_dir, tmp_path, records, predict_with_generate=True, chat_template="thinking")
    evaluate(cfg)
    (line,) = read(tmp_path / "output" / "eval_predictions.jsonl")
    assert line["prompt"].endswith("<|im_start|>assistant\n<think>\n")
    assert line["reference"] == "2"
    assert line["prediction"] == "" and line["thought"], "a thought that never ends is no answer"


def test_max_evaluate_steps_bounds_both(model_dir: Path, tmp_path: Path):
    cfg = settings(
        model_dir, tmp_path, samples(list("abcde")), batch_size=2, max_evaluate_steps=2, predict_with_generate=True
    )
    results = evaluate(cfg)
    assert results["num_samples"] == results["num_answers"] == 4


def test_a_model_without_weights_is_evaluated_at_its_random_start_if_told_so(tmp_path: Path):
    bare = model_directory(tmp_path / "bare", weights=False)
    cfg = settings(bare, tmp_path, samples(list("abcde")), continue_training=False)
    results = evaluate(cfg)
    assert results["model"] == str(bare)
    assert results == evaluate(cfg) | {"seconds": results["seconds"]}, "the seed decides the random start"
    with pytest.raises(CheckpointError, match="no weights"):
        evaluate(settings(bare, tmp_path, samples(list("abcde"))))


def test_a_question_too_long_for_the_model_counts_as_wrong(
    tmp_path: Path, model_dir: Path, heard: pytest.LogCaptureFixture
):
    small = model_directory(tmp_path / "small", max_position_embeddings=40)
    records = [{"src": ["long " * 60], "tgt": ["a"]}, {"src": ["short"], "tgt": ["a"]}]
    results = evaluate(settings(small, tmp_path, records, predict_with_generate=True, max_seq_len=40))
    assert results["num_answers"] == 2
    assert "counted as wrong: 1 of 2 questions, too long for the model's context of 40 tokens" in heard.text
    assert read(tmp_path / "output" / "eval_predictions.jsonl")[0]["stop"] == "prompt too long"


@pytest.mark.parametrize(
    ("records", "keys", "error", "message"),
    [
        ([{"text": "no question here"}], {"stage": "PT", "predict_with_generate": True}, ConfigError, "predict_with"),
        ([], {}, DataError, "eval.jsonl"),
        ([{"src": ["a"], "tgt": ["b"], "label": [0]}], {}, DataError, "dropped"),
        ([{"src": ["a"], "tgt": ["b"]}], {"checkpoint": "nowhere"}, CheckpointError, "checkpoint"),
        ([{"src": ["a"], "tgt": ["b"]}], {"model_name_or_path": None}, CheckpointError, "No valid checkpoint"),
        ([{"src": ["a"], "tgt": ["b"]}], {"output_dir": None}, ConfigError, "eval_output"),
    ],
)
def test_what_cannot_be_is_said(
    model_dir: Path,
    tmp_path: Path,
    records: list[dict[str, object]],
    keys: dict[str, object],
    error: type[UserError],
    message: str,
):
    with pytest.raises(error, match=message):
        evaluate(settings(model_dir, tmp_path, records, **keys))


def test_weights_that_are_not_finite_are_named(tmp_path: Path):
    from erniekit.checkpoint.model_io import save_model

    broken = model_directory(tmp_path / "broken")
    model = load_model(broken)
    model.model.norm.weight.set_value(np.full(model.model.norm.weight.shape, np.nan, dtype=np.float32))
    save_model(model, broken)
    with pytest.raises(EvaluationError, match=r"broken: the loss on the evaluation data is nan.*earlier checkpoint"):
        evaluate(settings(broken, tmp_path, samples(list("abcde"))))


def test_a_full_disk_does_not_lose_the_scores(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("erniekit.utils.atomic.write_text", full)
    with pytest.raises(UserError, match=r"eval_results.json: cannot be written: No space left on device"):
        evaluate(settings(model_dir, tmp_path, samples(["4"] * len(QUESTIONS))))
    assert "perplexity" in capsys.readouterr().out


def test_a_table_that_nobody_reads_is_a_broken_pipe(monkeypatch: pytest.MonkeyPatch):
    """Which the command meets as for every other output: not the end of the process by the library of tables."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):
            print_table({"model": "m", "num_samples": 1, "loss": 1.0})
        with contextlib.suppress(BrokenPipeError):
            stream.close()
