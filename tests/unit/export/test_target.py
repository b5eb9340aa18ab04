"""Which directories export, split and convert write to."""

import os

import pytest

from erniekit.checkpoint import model_dir
from erniekit.checkpoint.run_record import RunRecord
from erniekit.checkpoint.safetensors_write import replace_weights
from erniekit.export import target as module
from erniekit.export.target import SOURCE_FILE, model_target
from erniekit.utils.errors import CheckpointError, UserError


def make(directory, content="w"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text(content)
    return directory


def write(target, *sources, command="export", overwrite=False, content="new"):
    with model_target(target, command, sources, overwrite, "overwrite=true") as staging:
        make(staging, content)


def test_the_same_source_again(tmp_path):
    for source in (tmp_path / "out", tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-8"):
        write(tmp_path / "target", make(source), content=source.name)
        assert (tmp_path / "target" / "model.safetensors").read_text() == source.name
    assert str(tmp_path) not in (tmp_path / "target" / SOURCE_FILE).read_text(), "it goes to others"


def test_a_source_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for source in ("baidu/ERNIE-4.5-0.3B-PT", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"no model directory '{source}'"):
            write(tmp_path / "new" / "target", source)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["export", "convert"])
def test_another_model_is_replaced_only_if_asked(tmp_path, command, monkeypatch):
    said = []
    monkeypatch.setattr(module.log, "info", said.append)
    first, second, target = make(tmp_path / "a"), make(tmp_path / "b"), tmp_path / "target"
    write(target, first, content="first")
    (target / "tokenizer.json").write_text("of the first")
    (target / "notes.txt").write_text("mine")
    changes = [(first, second)] if command == "export" else [(first,)]  # an adapter more, another command
    for sources in ((second,), *changes):
        with pytest.raises(CheckpointError, match=r"target holds another model .* overwrite=true"):
            write(target, *sources, command=command if sources != (second,) else "export")
    assert (target / "model.safetensors").read_text() == "first" and said == []
    write(target, second, overwrite=True, content="second")
    assert (target / "model.safetensors").read_text() == "second"
    assert not (target / "tokenizer.json").exists() and (target / "notes.txt").read_text() == "mine"
    assert len(said) == 1 and "replaces the model" in said[0]


def test_a_kill_never_leaves_files_of_the_earlier_model_beside_the_new_weights(tmp_path, monkeypatch):
    first, second, target = make(tmp_path / "a"), make(tmp_path / "b"), tmp_path / "target"
    old = ("tokenizer.json", "adapter_config.json", "quantization_report.json", "quantization_report.png")

    def killed(*weights):
        replace_weights(*weights)
        raise KeyboardInterrupt

    for source in (first, second):
        write(target, first, overwrite=True, content="first")
        for name in old:
            (target / name).write_text("of the first")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(model_dir, "replace_weights", killed)
            write(target, source, overwrite=True, content="second")
        assert (target / "model.safetensors").read_text() == "second"
        left = {name for name in old if (target / name).exists()}
        assert left == (set(old[:2]) if source == first else set())


def test_a_second_command_for_the_same_target_is_refused(tmp_path):
    source, target = make(tmp_path / "a"), tmp_path / "target"
    with model_target(target, "export", [source], False, "overwrite=true") as staging:
        with pytest.raises(UserError, match=rf"target: {target} is in use by process {os.getpid()}"):
            write(target, source)
        make(staging, "of the first")
    assert (target / "model.safetensors").read_text() == "of the first"
    write(target, source, content="of the second")
    assert (target / "model.safetensors").read_text() == "of the second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "target"]


def test_a_file_in_place_of_the_directory_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "target").write_text("mine")
    message = "target is a file where a directory is to be written"
    target = model_target(tmp_path / "target", "export", [make(tmp_path / "a")], True, "overwrite=true")
    with pytest.raises(CheckpointError, match=message), target:
        raise AssertionError("the model is written before")


def test_a_directory_in_place_of_a_file_stays_as_it_is(tmp_path):
    (tmp_path / "target" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a directory where a file is to be written"):
        write(tmp_path / "target", make(tmp_path / "a"), overwrite=True)


def test_a_model_that_nobody_marked(tmp_path):
    with pytest.raises(CheckpointError, match="another model"):
        write(make(tmp_path / "downloaded"), make(tmp_path / "a"))


def test_a_directory_with_other_files_takes_a_model(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "notes.txt").write_text("mine")
    write(tmp_path / "target", make(tmp_path / "a"))
    assert (tmp_path / "target" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_directory_of_a_run(tmp_path, overwrite):
    make(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "begun").mkdir()
    RunRecord({}).write(tmp_path / "begun")
    for run in ("run", "begun"):
        with pytest.raises(CheckpointError, match="output_dir of a run"):
            write(tmp_path / run, make(tmp_path / "a"), overwrite=overwrite)


def test_a_target_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            write(target, make(tmp_path / "a"))
    assert (tmp_path / "file").read_text() == "x"
