"""The demo's data: right answers, nothing of the test in the training set, files that are what the tool makes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from erniekit.data.records.formats import parse_record

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("make_demo_data", ROOT / "tools/make_demo_data.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

UNITS = {"千": 1000, "百": 100, "十": 10}
FILES = (
    "data/demo/train.jsonl",
    "data/demo/test.jsonl",
    "examples/data/sft-train.jsonl",
    "examples/data/sft-eval.jsonl",
)


def read(path):
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def pairs(lines):
    for line in lines:
        start = line.get("is_system", 0)
        yield from zip(line["src"][start:], line["tgt"][start:], strict=True)


def chinese_value(text):
    total, digit = 0, 0
    for character in text:
        if character in UNITS:
            total, digit = total + (digit or 1) * UNITS[character], 0
        else:
            digit = "零一二三四五六七八九".index(character)
    return total + digit


def english_value(text):
    words = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
    )
    words += "seventeen eighteen nineteen".split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    total, part = 0, 0
    for word in re.split("[ -]", text):
        if word in words:
            part += words.index(word)
        elif word in tens:
            part += 10 * (tens.index(word) + 2)
        else:
            total, part = total + part * {"hundred": 100, "thousand": 1000}[word], 0
    return total + part


def solve(question):
    """(fact, answer) worked out from the question alone, not with the tool's own functions."""
    if question.endswith("写成数字"):
        value = chinese_value(question.removesuffix("写成数字"))
        return ("number", value), str(value)
    if question.endswith("写成中文"):
        return ("number", int(question.removesuffix("写成中文"))), None
    if question.startswith("Write in digits: "):
        value = english_value(question.removeprefix("Write in digits: "))
        return ("number", value), str(value)
    numbers = [int(digits) for digits in re.findall(r"\d+", question)]
    if "加" in question or "plus" in question or "+" in question:
        return ("sum", *sorted(numbers)), str(sum(numbers))
    if "ort" in question or "排序" in question:
        return ("sort", *sorted(numbers)), " ".join(str(n) for n in sorted(numbers))
    if "写成标准格式" in question:
        year, month, day = numbers
    else:
        day, year = numbers
        month = next(i for i, name in enumerate(tool.MONTHS, 1) if name in question)
    return ("date", year, month, day), f"{year}-{month:02d}-{day:02d}"


@pytest.mark.parametrize("path", FILES)
def test_every_answer_is_right(path):
    for question, answer in pairs(read(path)):
        fact, expected = solve(question)
        if expected is None:
            assert chinese_value(answer) == fact[1] and answer == tool.chinese_number(fact[1])
        else:
            assert answer == expected, question


@pytest.mark.parametrize(("train", "test"), [FILES[:2], FILES[2:]])
def test_no_fact_of_the_test_is_in_the_training_set(train, test):
    trained = {solve(question)[0] for question, _ in pairs(read(train))}
    asked = [solve(question)[0] for question, _ in pairs(read(test))]
    assert trained and asked and not trained & set(asked)


def test_questions_differ_and_sizes_are_as_said():
    train, test = read(FILES[0]), read(FILES[1])
    questions = [question for question, _ in pairs(train)] + [question for question, _ in pairs(test)]
    assert len(set(questions)) == len(questions) == 32400
    assert len(test) == 400 and all(len(line["src"]) == 1 for line in test)
    assert (ROOT / FILES[0]).stat().st_size < 4_000_000


def test_files_are_what_the_tool_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["", "--demo-dir", str(tmp_path / "data/demo"), "--examples-dir", str(tmp_path / "examples/data")]
    )
    tool.main()
    made = [f"examples/data/{kind}-{split}.jsonl" for kind in ("pt", "dpo", "kto") for split in ("train", "eval")]
    for path in (*FILES, *made):
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()


def test_every_line_is_of_its_format():
    for path in FILES:
        for line in read(path):
            assert parse_record(line, "erniekit").kind == "chat"
    for path in ("examples/data/pt-train.jsonl", "examples/data/pt-eval.jsonl"):
        lines = read(path)
        assert {key for line in lines for key in line} == {"text", "tgt"}
        for line in lines:
            assert parse_record(line, "text").text


def test_preference_pairs_hold_one_right_answer_twice_and_share_no_fact():
    facts = []
    for path in ("examples/data/dpo-train.jsonl", "examples/data/dpo-eval.jsonl"):
        facts.append(set())
        for line in read(path):
            sample = parse_record(line, "erniekit (DPO)")
            chosen, rejected = (side[0]["content"] for side in sample.answers)
            bare = chosen.removeprefix("答案是").removeprefix("The answer is ")[:-1]
            assert bare == rejected
            for question in line["src"]:
                fact, expected = solve(question)
                facts[-1].add(fact)
            assert expected is None or expected == rejected
    assert facts[0] and facts[1] and not facts[0] & facts[1]


def test_judged_answers_are_whole_sentences_if_they_are_good():
    for path in ("examples/data/kto-train.jsonl", "examples/data/kto-eval.jsonl"):
        samples = [parse_record(line, "erniekit (KTO)") for line in read(path)]
        assert 0.4 < sum(sample.is_good for sample in samples) / len(samples) < 0.6
        for sample in samples:
            answer = sample.messages[-1]["content"]
            assert answer.startswith(("答案是", "The answer is ")) == sample.is_good


def test_examples_show_the_optional_fields():
    fields = {key for line in read("examples/data/sft-train.jsonl") for key in line}
    assert fields == {"src", "tgt", "system", "label", "is_system"}


def test_numbers_in_words():
    assert [tool.chinese_number(n) for n in (0, 10, 11, 101, 110, 1001, 1010, 3021)] == (
        "零 十 十一 一百零一 一百一十 一千零一 一千零一十 三千零二十一".split()
    )
    assert tool.english_number(3042) == "three thousand forty-two" and tool.english_number(0) == "zero"
    for n in range(10000):
        assert chinese_value(tool.chinese_number(n)) == n and english_value(tool.english_number(n)) == n


def test_asking_for_more_than_there_is_says_so(monkeypatch):
    monkeypatch.setattr(tool, "TASKS", ((1.0, tool.sorting),))
    with pytest.raises(SystemExit, match="smaller --train"):
        tool.split(0, 3000, 10)
