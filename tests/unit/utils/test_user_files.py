"""The one reader of files that come from a user: every surprise is one error with file, place and cure."""

import json
import os
import random

import pytest

from erniekit.utils import user_files
from erniekit.utils.errors import CheckpointError, DataError, UserError
from erniekit.utils.user_files import JsonObject, parse_json, read_json, read_json_object


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "'a' stands twice"),
        ("[NaN]", "NaN is not"),
        ("[-Infinity]", "-Infinity is not"),
        ("[" + "7" * 5000 + "]", "4300 digits"),
        ("[" * 101 + "]" * 101, "100 levels"),
        ("[" * 100_000, "100 levels"),
        ('"\\ud800"', "half of a pair"),
        ('{"\\uD800": 1}', "half of a pair"),
        ("{'a': 1}", "quotes at column 2"),
        ("", "not JSON"),
        ('"\t"', "Invalid control character at column 2."),
        ('{"a": 1\n', "delimiter at column 8."),
        ('{"a": 1 2}\r\n', "delimiter at column 9."),
        ('{"a": 1,\n"b": 2\n\n', "delimiter at line 2, column 7."),
    ],
)
def test_json_that_python_settles_in_silence_is_refused_with_the_place(text, says):
    with pytest.raises(DataError, match=r"^x\.jsonl:7: ") as caught:
        parse_json(text, "x.jsonl:7", DataError)
    assert says in str(caught.value)


def test_valid_json_is_what_python_reads():
    content = {"a": [1, -2.5e3, None, True, "\U0001f600 加"], "b": {"a": {}}}
    assert parse_json(json.dumps(content), "x", DataError) == content
    assert parse_json("[" * 100 + "]" * 100, "x", DataError)


def test_what_is_no_regular_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "big.json").write_bytes(b" " * 100)
    (tmp_path / "gbk.json").write_bytes('{"a":\n "模板"}'.encode("gbk"))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    (tmp_path / "list.json").write_text("[]")
    for name, says in (("pipe.json", "regular"), (".", "directory"), ("gbk.json", "line 2")):
        with pytest.raises(CheckpointError, match=says):
            read_json(tmp_path / name, CheckpointError)
    with pytest.raises(CheckpointError, match="at most 99"):
        read_json(tmp_path / "big.json", CheckpointError, limit=99)
    with pytest.raises(CheckpointError, match="one JSON object, found a list"):
        read_json_object(tmp_path / "list.json", CheckpointError)
    assert read_json_object(tmp_path / "bom.json", CheckpointError) == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json", CheckpointError)


def test_a_value_of_another_type_is_named_with_its_key():
    values = JsonObject({"a": "x", "n": 3, "f": 1e999, "t": True, "o": {"k": []}, "z": None}, "config.json", DataError)
    assert values.get_text("a", None) == "x" and values.get_int("n", 0) == 3 and values.get_int("z", 7) == 7
    for read, says in (
        (lambda: values.get_int("a", 0), "config.json: a: must be an integer, found 'x'"),
        (lambda: values.get_int("t", 0), "t: must be an integer"),
        (lambda: values.get_int("n", 0, low=4), "of at least 4"),
        (lambda: values.get_number("f", 0.0), "f: must be a number"),
        (lambda: values.get_object("o").get_text("k", ""), "config.json: o: k: must be text"),
    ):
        with pytest.raises(DataError, match=says):
            read()


def test_mutated_json_is_read_or_refused_never_anything_else():
    rng = random.Random(3)
    base = json.dumps({"a": [1, 2.5, {"b": "加\ud83d\ude00"}], "c": None, "d": "x" * 20})
    pieces = ["{", "}", "[", "]", '"', ",", ":", "\\u", "\\ud800", "NaN", "1e999", "9" * 4301, "\0", "\ufeff", '"a":1,']
    refused = 0
    for _ in range(3000):
        text = base
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(pieces) * rng.choice([1, 1, 1, 200]) + text[at + rng.randrange(3) :]
        try:
            user_files.parse_json(text, "f", DataError)
        except UserError:
            refused += 1
    assert refused > 1000


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: a pointer of Git LFS .* `git lfs pull`"):
        read_json(tmp_path / "tokenizer.json", CheckpointError)
