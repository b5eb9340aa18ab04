"""What input_dir and split may say."""

import pytest

from erniekit.config import load
from erniekit.config.token_files import weighted_prefixes
from erniekit.utils.errors import ConfigError

TRAIN = {"model_name_or_path": "m", "output_dir": "out", "dataset_type": "pretrain", "stage": "PT", "input_dir": "a"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.4 ./a.bin 0.6 ~/b", [(0.4, "./a.bin"), (0.6, "/h/b")]),
        ("data/a_text_document", [(None, "data/a_text_document")]),
        ("a.idx\n b c", [(None, "a.idx"), (None, "b"), (None, "c")]),
        ("1 '/my data/a' 2e-1 b", [(1.0, "/my data/a"), (0.2, "b")]),
    ],
)
def test_input_dir(monkeypatch, text, expected):
    monkeypatch.setenv("HOME", "/h")
    assert weighted_prefixes(load(None, TRAIN | {"input_dir": text}).input_dir) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "needed with dataset_type: pretrain"),
        ("0.4 a 0.6", "expected .weight prefix"),
        ("a 0.6 b", "the weight of 0.6 must be a number more than 0, got 'a'"),
        ("0.4 a b c", "the weight of c must be a number more than 0, got 'b'"),
        ("0 a 1 b", "the weight of a must be"),
        ("-1 a 1 b", "the weight of a must be"),
        ("nan a 1 b", "the weight of a must be"),
        ("1 a 1 b::CPT", "::CPT marks data for self_constraint_cpt"),
        ("1 'a 1 b", "no closing quotation"),
        (".", r"\. is not a prefix: the files are PREFIX.bin and PREFIX.idx"),
        ("1 a 1 /", "/ is not a prefix"),
        ("a ./..", "./.. is not a prefix"),
        (".bin", ".bin is not a prefix"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_input_dir_that_cannot_be_read_says_so(text, expected, command):
    with pytest.raises(ConfigError, match=f"input_dir: .*{expected}"):
        load(None, TRAIN | {"input_dir": text}, command)


@pytest.mark.parametrize("wrong", [[], "1,2,3,4", "a,b", "1,-1", "0,0,0", "nan,1"])
def test_a_split_that_cannot_be_read_says_so(wrong):
    with pytest.raises(ConfigError, match="split: "):
        load(None, TRAIN | {"split": wrong})
