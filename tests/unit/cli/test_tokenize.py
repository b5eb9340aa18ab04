"""`erniekit tokenize`: its arguments, what it says, and what it writes."""

import json
import re
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

from erniekit.cli import tokenize
from erniekit.cli.main import EXIT_USER_ERROR, main
from erniekit.data.tokens.files import TokenFile
from erniekit.utils.errors import ConfigError

TOKENIZER = f"tokenizer={REPOSITORY}/examples/models/tiny-moe"


@pytest.fixture
def text(tmp_path: Path) -> str:
    lines = [json.dumps({"text": f"text {i}"}) for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{nonsense"]))
    return str(tmp_path / "in.jsonl")


def test_it_says_what_it_wrote_and_refuses_to_replace_it(text, tmp_path, capsys):
    command = ["tokenize", text, TOKENIZER, f"output={tmp_path}/x", "workers=0", "on_bad_line=skip"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/x.bin and .idx: 5 documents, " in said and "1 bad record skipped" in said
    assert TokenFile(tmp_path / "x", 576).num_documents == 5
    assert main(command) == EXIT_USER_ERROR
    assert re.search(r"error: .*x.bin: already there.*overwrite=true", capsys.readouterr().err)
    assert main([*command, "overwrite=true"]) == 0


def test_a_bad_line_stops_it_with_its_place(text, tmp_path, capsys):
    assert main(["tokenize", text, TOKENIZER, f"output={tmp_path}/x", "workers=0"]) == EXIT_USER_ERROR
    assert "in.jsonl:6: not JSON" in capsys.readouterr().err


def test_both_forms_of_options_and_their_names():
    inputs, options = tokenize.parse(["a", "--tokenizer", "m", "--output=o", "b", "append_eos=no", "workers=3"])
    assert inputs == ["a", "b"]
    assert options == {"tokenizer": "m", "output": "o", "append_eos": False, "num_workers": 3}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a", "output=o"], "tokenizer: needed"),
        (["a", "tokenizer=m"], "output: needed"),
        (["tokenizer=m", "output=o"], "expected .jsonl or .txt files"),
        (["a", "tokenizer=m", "output=."], r"output=.: . is not a prefix: the files are PREFIX.bin"),
        (["a", "tokenizer=m", "output=o", "workers=-1"], r"workers=-1: must be 0 \(this process alone\) or more"),
        (["a", "tokenizer=m", "output=o", "workers=two"], "workers=two: expected an integer"),
        (["a", "tokenizer=m", "output=o", "note_every=-1"], "note_every=-1: must be at least 0"),
        (["a", "tokenizer=m", "output=o", "append_eos=perhaps"], "append_eos=perhaps: expected True or False"),
        (["a", "tokenizer=m", "output=o", "on_bad_line=mend"], "on_bad_line=mend: expected one of error, skip"),
        (["a", "tokenizer=m", "output=o", "worker=2"], "worker=2: the options of `erniekit tokenize` are tokenizer"),
    ],
)
def test_wrong_arguments_say_what_is_expected(args, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        tokenize.parse(args)
    assert "usage: erniekit tokenize" in str(caught.value)
