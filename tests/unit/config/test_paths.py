"""Every key that is a path is made one in one place."""

import os
import re
from pathlib import Path

import pytest

from erniekit.config import Config, load, schema
from erniekit.config.compat import Alias
from erniekit.config.compat_keys import RULES
from erniekit.config.paths import expand
from erniekit.utils.errors import ConfigError

PATHS = {name: field.metadata["path"] for name, field in schema.fields().items() if field.metadata["path"]}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")


def paths(name: str, cfg: Config) -> object:
    """The value of a path key, which is one path or several."""
    return vars(cfg)[name]


def message(name: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(None, {name: value}, "version")
    return str(caught.value)


def test_every_key_that_is_named_like_a_path_is_one():
    for name, field in schema.fields().items():
        if field.type is not bool and re.search(r"(_path|_dir|_file|_cache|_output)$|checkpoint$|_or_path$", name):
            assert name in PATHS, name


@pytest.mark.parametrize("name", PATHS)
def test_the_home_directory_is_known_to_every_path(name: str, tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(f"stage: VL-SFT\n{name}: ~/a b/c\n")
    assert paths(name, load(str(path), None, "version")) in ("/h/a b/c", ("/h/a b/c",), ("/h/a", "b/c"))
    user = os.path.expanduser("~root")
    for given, expected in (("~/x", "/h/x"), ("~", "/h"), ("./~/x", "./~/x"), ("~root/x", f"{user}/x")):
        quoted = ["stage=VL-SFT", f"{name}='{given}'"]  # a bare ~ is null
        assert paths(name, load(None, quoted, "version")) in (expected, (expected,))
        assert paths(name, load(None, {name: given, "stage": "VL-SFT"}, "version")) in (expected, (expected,))


def test_another_name_of_a_path_is_a_path():
    for name, rule in RULES.items():
        if isinstance(rule, Alias) and rule.to in PATHS:
            assert paths(rule.to, load(None, {name: "~/x"}, "version")) in ("/h/x", ("/h/x",))


@pytest.mark.parametrize("name", [name for name in PATHS if "item" in schema.fields()[name].metadata])
def test_every_path_of_several(name: str):
    assert paths(name, load(None, {name: "~/a, b ,~/c", "stage": "VL-SFT"}, "version")) == ("/h/a", "b", "/h/c")
    assert paths(name, load(None, {name: ["~/a", "b", "~/c d"], "stage": "VL-SFT"}, "version")) == (
        "/h/a",
        "b",
        "/h/c d",
    )
    assert paths(name, load(None, {name: ["~/a,b", "c"], "stage": "VL-SFT"}, "version")) == (
        "/h/a,b",
        "c",
    )  # a comma inside one path


def test_paths_among_weights():
    assert load(None, {"input_dir": "0.3 ~/a  0.7 ~/b"}, "version").input_dir == ("0.3", "/h/a", "0.7", "/h/b")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("~nobody-of-that-name/x", "there is no home directory for ~nobody-of-that-name"),
        ("$HOME/x", "Write ${HOME} for the environment variable HOME"),
        ("x/$RUN_1", "Write ${RUN_1}"),
        ("s3://bucket/x", "is a URL"),
        ("a\0b", "NUL"),
        ("\x1b", "control characters"),
        ("x/" + "中" * 86 + "/y", "a name of 258 bytes is too long: at most 255"),
        ("x/" * 2048 + "y", "a path of 4097 bytes is too long: at most 4095"),
    ],
)
def test_what_cannot_be_meant_as_a_path_is_refused(name: str, value: str, expected: str):
    assert message(name, value).startswith(f"{name}: ") and expected in message(name, value)


def test_a_line_break_in_a_path_is_refused():
    assert "control characters" in message("output_dir", "a\n")


def test_a_dollar_that_names_nothing_stays():
    assert expand("a$1/b$") == "a$1/b$"


def test_the_configuration_file_itself_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("seed: 5\n")
    assert load("~/x.yaml", None, "version").seed == 5


def test_python_gives_path_objects_for_path_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"output_dir": Path("~/runs"), "model_name_or_path": Path("~/m"), "train_dataset_path": [Path("~/a.jsonl")]}
    cfg = load(None, given, command="train")
    assert (cfg.output_dir, cfg.model_name_or_path) == (f"{tmp_path}/runs", f"{tmp_path}/m")
    assert cfg.train_dataset_path == (f"{tmp_path}/a.jsonl",)


@pytest.mark.parametrize("text", ["runs/\udcff", "\ud800"])
def test_a_path_that_is_no_utf_8_is_refused_with_its_key(text):
    with pytest.raises(ConfigError, match="output_dir: expected text, got bytes that are not UTF-8"):
        load(None, {"output_dir": text}, "version")
