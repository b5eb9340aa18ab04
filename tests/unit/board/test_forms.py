"""Form -> YAML -> Config, for every shipped configuration and for what users type."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.source_tree import REPOSITORY

from erniekit.board import forms
from erniekit.board.runs import Runs
from erniekit.config import load, reference, schema
from erniekit.config.read import MAX_BYTES
from erniekit.utils.errors import UserError

CONFIGS = REPOSITORY / "examples" / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
GOLDEN = REPOSITORY / "tests" / "golden" / "translated_keys.txt"
COMMANDS = {"run_eval": "eval", "run_export": "export", "run_chat": "chat"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path)


def read(text: str, path: Path, command: str = "train"):
    path.write_text(text, encoding="utf-8")
    return load(str(path), (), command)


def test_nothing_is_lost_from_file_to_form_to_yaml(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    tried: set[tuple[str, str]] = set()  # many files have the same lines, and each change reads the text again
    for name in FILES:
        original = text = (CONFIGS / name).read_text(encoding="utf-8")
        command = COMMANDS.get(Path(name).stem, "train")
        shown = forms.values(text)
        assert shown.keys() == {line.partition(":")[0] for line in text.splitlines()} & schema.fields().keys(), name
        for key, value in set(shown.items()) - tried:
            text = forms.change(text, key, value)
        tried |= shown.items()
        cfg = load(str(CONFIGS / name), (), command)
        again = read(text, tmp_path / "again.yaml", command)
        assert again == cfg and again.given == cfg.given, name
        assert comments(text) == comments(original), name
        # Typed into an empty form, each key has its value; what has no field (another toolkit's name) is not there.
        typed = read("".join(forms.change("", *item) for item in shown.items()), tmp_path / "typed.yaml", command)
        assert {key: vars(typed)[key] for key in shown} == {key: vars(cfg)[key] for key in shown}, name


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def test_every_key_of_a_command_has_a_field_with_its_words():
    for command in ("train", "eval", "export", "split", "server"):
        fields = {field["name"]: field for group in forms.groups(command, {}) for field in group["fields"]}
        assert fields.keys() == {entry.name for entries in reference.by_group(command).values() for entry in entries}
        assert all(field["doc"] == schema.fields()[name].metadata["doc"] for name, field in fields.items())
    assert fields["port"]["limits"] == "at least 0 and at most 65535"
    train = {field["name"]: field for group in forms.groups("train", {"seed": "种子"}) for field in group["fields"]}
    assert train["seed"]["doc"] == "种子" and train["stage"]["doc"] == schema.fields()["stage"].metadata["doc"]
    assert train["packing"]["choices"] == ["True", "False"] and "SFT" in train["stage"]["choices"]
    assert not train["train_dataset_type"]["choices"], "a list is typed"


TEXT = "# top\nseed: 1  # why\n\n### data\ntrain_dataset_path:\n  - a.jsonl\n  - b.jsonl\n# after\nstage: SFT\n"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "2", TEXT.replace("seed: 1 ", "seed: 2 ")),
        ("seed", "", TEXT.replace("seed: 1  # why\n", "")),
        ("train_dataset_path", "c.jsonl", TEXT.replace(":\n  - a.jsonl\n  - b.jsonl\n", ": c.jsonl\n")),
        ("train_dataset_path", "", TEXT.replace("train_dataset_path:\n  - a.jsonl\n  - b.jsonl\n", "")),
        ("stage", "", TEXT.replace("stage: SFT\n", "")),
        ("lora_rank", "8", TEXT + "lora_rank: 8\n"),
        ("lora_rank", " ", TEXT),
    ],
)
def test_a_change_touches_its_line_alone(key: str, value: str, expected: str):
    assert forms.change(TEXT, key, value) == expected


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=30))
def test_what_is_typed_is_what_is_read(value: str):
    text = forms.change(TEXT, "output_dir", value)
    assert forms.values(text).get("output_dir", "") == value.strip()
    assert forms.values(text)["stage"] == "SFT", "nothing else is changed"


@pytest.mark.parametrize(
    "value", ["a\nseed: 9", "x # y", "a: b", "[1", "*a", "!!python/object:os.system x", "- a", "{}"]
)
def test_what_yaml_would_read_otherwise_is_quoted(value: str):
    assert forms.values(forms.change("", "output_dir", value)) == {"output_dir": value}


def test_lists_are_shown_and_read_as_items(tmp_path: Path):
    assert forms.values(TEXT)["train_dataset_path"] == "a.jsonl, b.jsonl"
    awkward = "train_dataset_path: ['a,b.jsonl', c.jsonl]\ntrain_dataset_type: erniekit,erniekit\noutput_dir: o\n"
    again = forms.change("output_dir: o\n", "train_dataset_path", forms.values(awkward)["train_dataset_path"])
    again = forms.change(again, "train_dataset_type", "erniekit, erniekit")
    model = "model_name_or_path: m\n"
    assert read(again + model, tmp_path / "a.yaml") == read(awkward + model, tmp_path / "b.yaml")


def test_problems_stand_at_their_field(runs: Runs):
    said = forms.check("batch_size: x\nlearning_rat: 1\nlora_rank: 0\n", "train", runs)["problems"]
    assert said.keys() == {"batch_size", "", "lora_rank"} and "(line 1)" in said["batch_size"][0]
    assert "did you mean learning_rate" in said[""][0]
    assert forms.check("", "train", runs)["problems"] == {"": ["the file is empty."]}
    good = "train_dataset_path: a.jsonl\nmodel_name_or_path: m\noutput_dir: o\n"
    assert forms.check(good, "train", runs)["problems"] == {}
    assert "lora_rank" in str(forms.check(good + "lora_rank: 4\n", "train", runs)["notes"])
    said = forms.check(good + "resume_from_checkpoint: /etc\n", "train", runs)["problems"]
    assert said.keys() == {"resume_from_checkpoint"} and "allow=DIRECTORY" in said["resume_from_checkpoint"][0]
    said = forms.check(good.replace("a.jsonl", "[a.jsonl, ../b.jsonl]"), "train", runs)["problems"]
    assert said.keys() == {"train_dataset_path"}
    assert not list(runs.root.glob(".draft*")), "drafts are removed"


def test_what_is_no_configuration_is_refused(runs: Runs):
    for text in ("a: [", "- 1\n- 2\n", "just words", "a: &x [*x]\nb: *nobody", "\0"):
        with pytest.raises(UserError, match="YAML"):
            forms.values(text)
    with pytest.raises(UserError, match="braces"):
        forms.change('{"seed": 1}', "seed", "2")
    assert forms.values('{"seed": 1}') == {"seed": "1"} and forms.values("") == {}
    with pytest.raises(UserError, match="unknown key"):
        forms.change("", "sede", "2")
    for value in ("${oc.env:HOME}", "${env:HOME}", "${HOME}", '"${\\x6fc.env:HOME}"', "${oc.env:HOME,x}"):
        with pytest.raises(UserError, match=r"^\$\{HOME\}: the board reads no environment"):
            forms.check(f"output_dir: {value}\n", "train", runs)
    with pytest.raises(UserError, match="bytes"):
        forms.check("#" * (MAX_BYTES + 1), "train", runs)


def translated() -> list[str]:
    """A line for each key that has words in Chinese: its name, and a checksum of its English documentation."""
    words = json.loads((REPOSITORY / "erniekit/board/strings/keys_zh.json").read_text("utf-8"))
    return [f"{name} {zlib.crc32(schema.fields()[name].metadata['doc'].encode()):08x}" for name in sorted(words)]


def test_the_words_in_chinese_are_those_of_the_present_documentation():
    """Where the documentation of a key has changed, change its line in keys_zh.json too, then accept both:

    PYTHONPATH=.:tests python tests/unit/board/test_forms.py > tests/golden/translated_keys.txt
    """
    changed = set(translated()) ^ set(GOLDEN.read_text("utf-8").splitlines())
    assert not changed, (
        f"compare keys_zh.json with the schema: {', '.join(sorted({line.split()[0] for line in changed}))}"
    )


if __name__ == "__main__":
    print("\n".join(translated()))
