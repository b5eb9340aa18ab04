"""Options of commands that read no configuration, or have more than its keys."""

import os
from pathlib import Path

import pytest

from erniekit.cli import options
from erniekit.config.values import to_bool
from erniekit.utils.errors import ConfigError

READERS = {"strict": to_bool, "command": options.one_of("train", "eval")}


@pytest.mark.parametrize("words", [["strict=true"], ["--strict=true"], ["--strict", "true"]])
def test_three_ways_to_write_an_option(words: list[str]):
    assert options.read("check", ["x.yaml", *words, "seed=3"], READERS) == ({"strict": True}, ["x.yaml", "seed=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strict=perhaps"], "strict=perhaps: expected True or False"),
        (["command=trian"], "command=trian: expected one of train, eval"),
        (["x.yaml", "--strict"], "strict: a value is missing"),
        (["strict="], "strict: a value is missing"),
        (["strikt=true"], "strikt=true: the options of `erniekit check` are strict, command; did you mean strict?"),
        (["--comand", "eval"], "are strict, command; did you mean command?"),
    ],
)
def test_a_wrong_option_is_named_with_the_usage(words: list[str], message: str):
    with pytest.raises(ConfigError) as raised:
        options.read("check", words, READERS)
    assert message in str(raised.value) and "usage: erniekit check CONFIG.yaml" in str(raised.value)


def test_a_path_may_have_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    monkeypatch.setenv("HOME", "/h")
    assert options.read_with_paths("convert", ["a=b", "~/c"], READERS) == ({}, ["a=b", "/h/c"])
    with pytest.raises(ConfigError, match="a=c: the options of `erniekit convert` are strict, command"):
        options.read_with_paths("convert", ["a=c"], READERS)


def test_a_file_to_write_may_replace_a_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("old.json")
    for name in ("old.json", "new.json"):
        assert options.new_file(str(tmp_path / name)) == str(tmp_path / name)
    for path in ("/dev/null", "/dev/stdout", "/dev/fd/1", str(tmp_path / "link.json")):
        with pytest.raises(ValueError, match="a link or a device"):
            options.new_file(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind a superuser
    with pytest.raises(ValueError, match=f"not allowed to write in {tmp_path}"):
        options.new_file(str(tmp_path / "new.json"))
