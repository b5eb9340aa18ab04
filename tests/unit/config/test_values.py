"""What is written is what a key gets: text as it stands, numbers by one rule."""

import json
from pathlib import Path

import pytest

from erniekit.config import Config, load, schema
from erniekit.utils.errors import ConfigError

ODD_TEXTS = (
    "2024_06_01 007 1e5 0x10 0b11 0o17 yes no on off True 1:30 1_000 .5 5. +5 -0 .inf .nan 1.0 2024-06-01 =".split()
)


def by_yaml(tmp_path: Path, key: str, text: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(f"{key}: {text}\n", encoding="utf-8")
    return load(str(path), None, "version")


def by_json(tmp_path: Path, key: str, text: str) -> Config:
    path = tmp_path / "x.json"
    path.write_text(f'{{"{key}": {text}}}', encoding="utf-8")
    return load(str(path), None, "version")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_key_keeps_the_text_as_written(tmp_path: Path, text: str):
    assert by_yaml(tmp_path, "output_dir", text).output_dir == text
    assert by_yaml(tmp_path, "output_dir", f'"{text}"').output_dir == text
    assert by_yaml(tmp_path, "output_dir", f"[{text}]").output_dir == text
    assert load(None, [f"output_dir={text}"], "version").output_dir == text
    assert load(None, ["--output_dir", text], "version").output_dir == text


@pytest.mark.parametrize("text", ["2024", "1e5", "1.50", "-0"])
def test_a_number_of_json_is_text_where_text_is_wanted(tmp_path: Path, text: str):
    assert by_json(tmp_path, "output_dir", text).output_dir == text


def test_items_of_a_list_keep_their_text(tmp_path: Path):
    cfg = by_yaml(tmp_path, "train_dataset_path", "[007, 1_0, yes, 'a b']")
    assert cfg.train_dataset_path == ("007", "1_0", "yes", "a b")
    assert load(None, ["--train_dataset_path", "007", "1e3"], "version").train_dataset_path == ("007", "1e3")


def test_every_text_key_without_fixed_words_keeps_an_odd_text(tmp_path: Path):
    for name, field in schema.fields().items():
        is_text = field.type in (str, str | None) and not field.metadata["choices"]
        if is_text and name not in ("lr_scheduler_type", "train_dataset_prob", "eval_dataset_prob"):
            assert vars(by_yaml(tmp_path, name, "2024_06_01"))[name] == "2024_06_01", name


def test_another_name_of_a_text_key_keeps_the_text_too(tmp_path: Path):
    assert by_yaml(tmp_path, "template", "1_0").chat_template == "1_0"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1000", 1000),
        ("1_000", 1000),
        ("1e3", 1000),
        ("'7'", 7),
        ("+7", 7),
        ("2.0", 2),
        ("!!int 5", 5),
        ("5 # five", 5),
    ],
)
def test_a_whole_number(tmp_path: Path, text: str, number: int):
    assert by_yaml(tmp_path, "max_steps", text).max_steps == number
    assert type(by_yaml(tmp_path, "max_steps", text).max_steps) is int


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("010", "without a leading 0"),
        ("'010'", "without a leading 0"),
        ("0x10", "in decimal digits"),
        ("0b1", "in decimal digits"),
        ("0o17", "in decimal digits"),
        ("1:30", "in decimal digits"),
        ("1__0", "expected an integer"),
        ("1_", "expected an integer"),
        ("１２", "expected an integer"),
        ("1.5", "expected an integer"),
        (".inf", "expected an integer"),
        (".nan", "expected an integer"),
        ("1e400", "expected an integer"),
        ("9" * 20, "at most 9223372036854775807"),
        ("9" * 5000, "(5000 characters)"),
        (".", "expected an integer"),
        ("1 2", "expected an integer"),
    ],
)
def test_what_is_no_whole_number(tmp_path: Path, text: str, expected: str):
    with pytest.raises(ConfigError, match=r"^max_steps: ") as caught:
        by_yaml(tmp_path, "max_steps", text)
    assert expected in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["01.5", "1:30.5", "0x1p3", ".nan", "-.inf", "1e999", "1e-400", "9" * 400, "infinity"])
def test_what_is_no_number(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="learning_rate: expected a number"):
        by_yaml(tmp_path, "learning_rate", text)


@pytest.mark.parametrize(
    ("text", "number"), [(".5", 0.5), ("5e-5", 5e-5), ("1E-3", 1e-3), ("0.1", 0.1), ("0", 0.0), ("0e-400", 0.0)]
)
def test_a_number(tmp_path: Path, text: str, number: float):
    assert by_yaml(tmp_path, "learning_rate", text).learning_rate == number
    assert load(None, [f"learning_rate={text}"], "version").learning_rate == number


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), ("5GB", 5), ("500MB", 0.5), ("2 gib", 2.147483648), ("1e3kb", 1e-3)]
)
def test_a_size_is_a_number_of_gb_or_has_a_unit(tmp_path: Path, text: str, number: float):
    assert by_yaml(tmp_path, "max_shard_size", text).max_shard_size == number
    assert load(None, [f"max_shard_size={text}"], "version").max_shard_size == number


@pytest.mark.parametrize("text", ["big", "5XB", "GB", "1:30MB", "5GB 3MB", "0x5GB"])
def test_what_is_no_size(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="max_shard_size: expected a number of GB or a size such as 5GB, 500MB or 2G"):
        by_yaml(tmp_path, "max_shard_size", text)
    with pytest.raises(ConfigError, match="max_shard_size: must be more than 0"):
        by_yaml(tmp_path, "max_shard_size", "0MB")


@pytest.mark.parametrize("null", ["null", "~", "Null", "None", '"null"', "", "''"])
def test_null_is_not_given_for_every_key(tmp_path: Path, null: str):
    default = Config()
    for name, field in schema.fields().items():
        own_words = (*field.metadata["choices"], *field.metadata["words"])
        if null.strip("'\"").lower() in own_words:
            continue  # report_to: None and sharding: '' mean themselves
        assert vars(by_yaml(tmp_path, name, null))[name] == vars(default)[name], name
        assert vars(load(None, {name: None}, "version"))[name] == vars(default)[name], name


def test_a_key_that_may_be_null_is_null_by_default():
    """Else null, which means "not given", could not be asked for."""
    for name, field in schema.fields().items():
        if "None" in str(field.type):
            assert field.default is None, name


def test_null_takes_back_what_a_file_says(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 7\nper_device_train_batch_size: 4\ninput_dir: a\n")
    cfg = load(str(path), ["seed=null", "batch_size=null", "input_dir=~"], "version")
    assert (cfg.seed, cfg.batch_size, cfg.dataset_type) == (42, 1, "iterable")


def test_null_under_one_name_does_not_take_back_another_name(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("batch_size: null\nper_device_train_batch_size: 4\n")
    assert load(str(path), None, "version").batch_size == 4


def test_a_switch_says_whether_to_resume(tmp_path: Path):
    assert by_yaml(tmp_path, "resume_from_checkpoint", "True").resume_from_checkpoint == "auto"
    assert by_yaml(tmp_path, "resume_from_checkpoint", "off").resume_from_checkpoint == "none"
    assert by_json(tmp_path, "resume_from_checkpoint", "false").resume_from_checkpoint == "none"
    assert load(None, {"resume_from_checkpoint": True}, "version").resume_from_checkpoint == "auto"


def test_an_empty_word_among_the_choices_is_shown():
    with pytest.raises(ConfigError, match=r"expected one of '' \(nothing\), stage1, stage2, stage3, got 'stage4'"):
        load(None, ["sharding=stage4"], "version")


def test_the_saved_yaml_keeps_texts_and_dollars(tmp_path: Path):
    for text in (*ODD_TEXTS, "$${HOME}", "a$$$${b", "a\u2028b", "x #1", "{a}", "*x"):
        cfg = load(None, {"metric_for_best_model": text}, "version")
        path = tmp_path / "config.yaml"
        path.write_text(cfg.to_yaml(), encoding="utf-8", newline="")
        assert load(str(path), None, "version") == cfg, text


def test_numbers_of_python_are_taken_as_they_are():
    cfg = load(None, {"max_steps": 5, "learning_rate": 1e-3, "output_dir": 2024}, "version")
    assert (cfg.max_steps, cfg.learning_rate, cfg.output_dir) == (5, 1e-3, "2024")
    with pytest.raises(ConfigError, match="max_steps: expected an integer"):
        load(None, {"max_steps": 10**400}, "version")


def test_json_names_the_line_of_a_key(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"seed": 1, "a_args": {"max_steps": "x"}}, indent=1))
    with pytest.raises(ConfigError, match=r"max_steps: expected an integer, got 'x' \(.*x\.json:4\)"):
        load(str(path), None, "version")
