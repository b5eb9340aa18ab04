"""Files that another process writes: what is there is read, and what is broken raises nothing."""

import os
from pathlib import Path

import pytest

from erniekit.utils.growing_files import head, json_object, read, read_object, size_of, tail


@pytest.mark.parametrize("text", ["", "[1]", "{", "1", '{"a": ' + "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_what_is_no_object_is_none(text: str):
    assert json_object(text) is None


def test_numbers_that_json_lacks_are_null():
    assert json_object('{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1e3}') == {
        "a": None,
        "b": None,
        "c": None,
        "d": 1e3,
    }


def test_what_is_no_regular_file_is_empty(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe", tmp_path / "none" / "x"):
        assert (head(path, 9), read(path, 0), tail(path, 9), read_object(path)) == ("", b"", ("", 0, 0), {})
    assert size_of(tmp_path / "none") == 0


def test_the_ends_of_a_file(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes("ab一".encode() + b"\xff")
    assert head(path, 3) == "ab\ufffd" and tail(path, 4) == ("一\ufffd", 6, 2)
    assert tail(path, 9, 2) == ("一\ufffd", 6, 0) and tail(path, 9, 7)[0] == "ab一\ufffd", (
        "a shorter file is another one"
    )
    path.write_bytes("一二".encode()[:4])
    assert tail(path, 9) == ("一", 3, 0), "half a character waits for its rest"
