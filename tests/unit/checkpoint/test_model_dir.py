"""Directories are complete or as they were, and the newest complete one is found."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from erniekit.checkpoint import model_dir
from erniekit.checkpoint.model_dir import copy_companions, find_checkpoint, has_weights, not_copied, say_links, staged
from erniekit.checkpoint.run_record import FinalModel, RunRecord
from erniekit.config.schema import Config
from erniekit.utils.errors import CheckpointError, ConfigError


def make_model(directory, single=True):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / ("model.safetensors" if single else "model.safetensors.index.json")).write_text("x")
    return directory


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model-00001-of-00002.safetensors", "1 weight shard but no model.safetensors.index.json"),
        ("pytorch_model.bin", "It has pytorch_model.bin, which this toolkit does not read as a model. Convert them"),
        ("pytorch_model.safetensors", "It has pytorch_model.safetensors, .* Rename the file of a whole model to model"),
        ("adapter_model.safetensors", "holds a LoRA adapter and no model: name its base model there, and the adapter"),
        ("notes.txt", "holds no weights. Copy the model's weight files there, or set continue_training: false"),
    ],
)
def test_a_random_start_is_proposed_only_where_no_weights_are(tmp_path, name, expected):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=f"model_name_or_path: .*{expected}"):
        model_dir.require_weights(tmp_path)
    if name == "notes.txt":
        with pytest.raises(ConfigError, match=r"holds no weights\. Train it first"):
            model_dir.require_weights(tmp_path, "Train it first.")


def contents(directory):
    return {file.name: file.read_text() for file in directory.iterdir() if file.is_file()}


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with staged(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    assert contents(target) == {"a": "1"}
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


def test_every_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), sync(descriptor)))
    for target in (tmp_path / "new", tmp_path):
        with staged(target) as staging:
            (staging / "tokenizer.json").write_text("t")
        assert (target / "tokenizer.json").stat().st_ino in synced


def test_an_existing_directory_keeps_its_other_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("m")
    make_model(tmp_path, single=False)
    (tmp_path / "model-00001-of-00001.safetensors").write_text("old shard")
    with staged(tmp_path) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "config.json").write_text("new config")
    assert contents(tmp_path) == {"metrics.jsonl": "m", "model.safetensors": "new", "config.json": "new config"}


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_changes_nothing(tmp_path, exists):
    target = tmp_path / "model"
    if exists:
        make_model(target)
    with pytest.raises(KeyError), staged(target) as staging:
        (staging / "model.safetensors").write_text("half")
        raise KeyError
    with pytest.raises(CheckpointError, match="full"), staged(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == ([target] if exists else [])
    if exists:
        assert contents(target) == {"config.json": "{}", "model.safetensors": "x"}


def test_what_a_crash_left_is_removed(tmp_path):
    (tmp_path / ".model.new.tmp").mkdir()
    (tmp_path / ".model.new.tmp" / "model.safetensors").write_text("half")
    with staged(tmp_path / "model") as staging:
        (staging / "config.json").write_text("{}")
    assert contents(tmp_path / "model") == {"config.json": "{}"}


@pytest.mark.parametrize("after", range(5))
def test_a_crash_while_files_are_renamed_never_mixes_two_models(after, tmp_path, monkeypatch):
    names = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = (*names, "model.safetensors.index.json")
    for name in names:
        (tmp_path / name).write_text("old")
    real, renamed = os.replace, []

    def replace(source, target):
        if len(renamed) == after:
            raise KeyboardInterrupt
        renamed.append(target)
        real(source, target)

    monkeypatch.setattr(model_dir.os, "replace", replace)
    try:
        with staged(tmp_path) as staging:
            for name in names:
                (staging / name).write_text("new")
    except KeyboardInterrupt:
        assert not has_weights(tmp_path)
    else:
        assert after == 4 and contents(tmp_path) == dict.fromkeys(names, "new")


def test_the_final_model_wins_then_the_newest_complete_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"No valid checkpoint found in: .*nothing"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "config.json").write_text("{}")
    make_model(tmp_path / ".checkpoint-40.tmp")
    make_model(tmp_path / "checkpoint-best")
    with pytest.raises(CheckpointError, match="No valid checkpoint"):
        find_checkpoint(tmp_path)
    make_model(tmp_path / "checkpoint-9")
    make_model(tmp_path / "checkpoint-20", single=False)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_dir.log, "warning", said.append)
        assert find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-20"
    assert len(said) == 1 and "checkpoint-30" in said[0]
    make_model(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path


def test_companions(tmp_path):
    source, target = make_model(tmp_path / "a"), tmp_path / "b"
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_ernie4_5.py", ".gitattributes"):
        (source / name).write_text(name)
    assert copy_companions(source, target) == ["tokenizer.json", "chat_template.jinja"]
    assert contents(target) == {"tokenizer.json": "tokenizer.json", "chat_template.jinja": "chat_template.jinja"}
    assert not_copied(source) == ["modeling_ernie4_5.py"]


@pytest.fixture
def said(monkeypatch):
    lines = []
    for kind in ("info", "warning"):
        monkeypatch.setattr(model_dir.log, kind, lines.append)
    return lines


def test_a_link_out_of_the_model_is_not_copied_and_named(tmp_path, said):
    (tmp_path / "private").write_text("a key")
    source, target = make_model(tmp_path / "model"), tmp_path / "target"
    target.mkdir()
    (source / "tokenizer.json").write_text("t")
    (source / "tokenizer_config.json").symlink_to("tokenizer.json")
    (source / "LICENSE").symlink_to("../private")
    (source / "README.md").symlink_to("nothing")
    os.mkfifo(source / "generation_config.json")
    for _ in range(2):  # as each save of a run does
        assert copy_companions(source, target) == ["tokenizer.json", "tokenizer_config.json"]
    assert contents(target) == {"tokenizer.json": "t", "tokenizer_config.json": "t"}
    assert not any(path.is_symlink() for path in target.iterdir())
    assert len(said) == 3
    assert f"LICENSE: not copied: a link to {tmp_path}/private, outside" in " ".join(said)


def test_links_of_a_hub_cache_are_followed(tmp_path, said):
    repository, target = tmp_path / "models--owner--name", tmp_path / "target"
    (repository / "blobs").mkdir(parents=True)
    target.mkdir()
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "private").write_text("a key")
    for name in ("LICENSE", "tokenizer.json", "model.safetensors"):
        (repository / "blobs" / name[::-1]).write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    (snapshot / "README.md").symlink_to("../../../private")
    (tmp_path / "short").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "short"):
        assert sorted(copy_companions(place, target)) == ["LICENSE", "tokenizer.json"]
    say_links(snapshot)
    assert [line for line in said if "README.md" not in line] == []


def test_weights_that_are_read_from_elsewhere_are_named(tmp_path, said):
    source = make_model(tmp_path / "model")
    (source / "model.safetensors").rename(tmp_path / "far")
    (source / "model.safetensors").symlink_to(tmp_path / "far")
    say_links(source)
    assert len(said) == 1 and f"is a link to {tmp_path}/far" in said[0]


@pytest.mark.parametrize(
    ("final", "branch", "meant"),
    [
        (FinalModel(9, 1, 9, False), 1, ""),
        (FinalModel(4, 1, 4, False), 1, "checkpoint-9"),
        (FinalModel(20, 1, 20, False), 2, "checkpoint-9"),
        (None, 1, "checkpoint-9"),
    ],
    ids=["finished", "made longer", "gone back", "not of this run"],
)
def test_find_checkpoint_chooses_between_final_model_and_checkpoint(tmp_path, said, final, branch, meant):
    make_model(tmp_path)
    make_model(tmp_path / "checkpoint-9")
    make_model(tmp_path / "abandoned-1" / "checkpoint-20")
    RunRecord({}, branch=branch, final_model=final).write(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / meant
    assert len(said) == bool(meant)
    assert not meant or ("checkpoint-9" in said[0] and "not the final model" in said[0])


def test_replacing_a_single_file_never_pairs_old_weights_with_a_new_configuration(tmp_path, monkeypatch):
    target = make_model(tmp_path / "model")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_dir.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), staged(target) as staging:
        make_model(staging)
    assert not has_weights(target)


def test_what_is_saved(tmp_path: Path):
    def said_with(**keys: object) -> str:
        return model_dir.what_is_saved(replace(Config(), output_dir=str(tmp_path), **keys))

    assert said_with(overwrite_output_dir=True) == "no checkpoint has been saved"
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", ".checkpoint-11.tmp"):
        (tmp_path / name).mkdir()
    newest = f"the newest checkpoint is {tmp_path}/checkpoint-10; the same command"
    assert said_with() == f"{newest} resumes from there"
    assert said_with(overwrite_output_dir=True) == f"{newest} with overwrite_output_dir=false resumes from there"
    for other in (str(tmp_path / "checkpoint-9"), "elsewhere/checkpoint-3", "none"):
        words = "resume_from_checkpoint=auto"
        assert said_with(resume_from_checkpoint=other) == f"{newest} with {words} resumes from there"
