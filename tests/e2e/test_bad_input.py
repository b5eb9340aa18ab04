"""What a user can get wrong: one clear message (what, where, what to do), exit code not 0, nothing saved is lost."""

import errno
import json

import pytest

import erniekit
from erniekit.checkpoint import safetensors_write
from erniekit.cli.main import main


@pytest.fixture
def fail(workspace, capfd):
    """Runs `erniekit train` in this process, expects failure; returns the error text."""

    def run(*overrides, command="train", config="run.yaml"):
        code = main([command, str(workspace / config), *overrides])
        error = capfd.readouterr().err
        assert code != 0, error
        assert "Traceback" not in error
        assert error.count("error: ") == 1, error
        return error[error.index("error: ") :]

    return run


def rewrite(path, edit):
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("".join(line + "\n" for line in lines))


def test_missing_configuration_file(fail):
    assert "nowhere.yaml" in fail(config="nowhere.yaml")


def test_wrong_type_of_a_key(fail):
    message = fail("max_steps=many")
    assert "max_steps" in message and "many" in message


def test_unknown_key_names_the_nearest(fail, workspace):
    rewrite(workspace / "run.yaml", lambda lines: lines.append("learning_rat: 1.0e-3"))
    message = fail()
    assert "learning_rat" in message and "learning_rate" in message and "run.yaml" in message


def test_missing_model_directory(fail, workspace):
    message = fail(f"model_name_or_path={workspace}/no/such/model")
    assert "model_name_or_path" in message and "no/such/model" in message


def test_model_without_weights_points_to_the_random_start(fail):
    message = fail("continue_training=true")
    assert "continue_training: false" in message or "safetensors" in message


def test_missing_data_file(fail, workspace):
    assert "gone.jsonl" in fail(f"train_dataset_path={workspace}/gone.jsonl")


def test_empty_data(fail, workspace):
    (workspace / "train.jsonl").write_text("")
    assert "train.jsonl" in fail()


def test_line_that_is_not_json(fail, workspace):
    rewrite(workspace / "train.jsonl", lambda lines: lines.insert(2, '{"src": ["q"], "tgt": ["a"'))
    assert "train.jsonl:3" in fail()


def test_bad_lines_can_be_skipped_and_are_counted(workspace, capfd):
    rewrite(workspace / "train.jsonl", lambda lines: lines.insert(2, "not json"))
    assert main(["train", str(workspace / "run.yaml"), "on_bad_line=skip", "max_steps=1"]) == 0
    assert "train.jsonl:3" in capfd.readouterr().err


def test_src_and_tgt_of_different_length(fail, workspace):
    rewrite(workspace / "train.jsonl", lambda lines: lines.append('{"src": ["a", "b"], "tgt": ["c"]}'))
    message = fail()
    assert "train.jsonl:121" in message and "src" in message and "tgt" in message


def test_unknown_field_of_the_data(fail, workspace):
    rewrite(workspace / "train.jsonl", lambda lines: lines.append('{"src": ["a"], "target": ["c"]}'))
    message = fail()
    assert "train.jsonl:121" in message and "target" in message


def test_tokenizer_with_more_tokens_than_the_model(fail, workspace):
    file = workspace / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))
    message = fail()
    assert "100" in message and "vocab" in message


def test_truncated_weights(fail, workspace):
    erniekit.train(str(workspace / "run.yaml"), max_steps=1)
    file = workspace / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = fail(f"model_name_or_path={workspace}/out", "continue_training=true", f"output_dir={workspace}/other")
    assert "model.safetensors" in message and "truncated" in message


def test_another_runs_output_directory(fail, workspace):
    erniekit.train(str(workspace / "run.yaml"), max_steps=2)
    before = (workspace / "out" / "checkpoint-2" / "model.safetensors").read_bytes()
    message = fail("seed=7", "max_seq_len=32")
    assert (
        "another run" in message
        and "seed" in message
        and "max_seq_len" in message
        and "overwrite_output_dir" in message
    )
    assert (workspace / "out" / "checkpoint-2" / "model.safetensors").read_bytes() == before


def test_overwriting_another_run_is_said(workspace, capfd):
    erniekit.train(str(workspace / "run.yaml"), max_steps=2)
    assert main(["train", str(workspace / "run.yaml"), "seed=7", "max_steps=1", "overwrite_output_dir=true"]) == 0
    assert "removed 1 checkpoints" in capfd.readouterr().err


def test_full_disk_during_a_save(fail, workspace, monkeypatch):
    """The second save finds the disk full: the first one is complete, and the same command resumes from it."""
    real, written = safetensors_write._write_all, []

    def almost_full(file, data):
        written.append(len(data))
        if (workspace / "out" / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(safetensors_write, "_write_all", almost_full)
    message = fail()
    assert "checkpoint-4" in message and "full" in message
    names = sorted(p.name for p in (workspace / "out").iterdir() if "checkpoint" in p.name)
    assert names == ["checkpoint-2"]
    monkeypatch.undo()
    result = erniekit.train(str(workspace / "run.yaml"))
    assert [record["step"] for record in result.history] == [3, 4, 5, 6]
    whole = erniekit.train(str(workspace / "run.yaml"), output_dir=str(workspace / "whole"))
    assert [r["loss"] for r in result.history] == [r["loss"] for r in whole.history[2:]]


def test_damaged_newest_checkpoint(fail, workspace):
    erniekit.train(str(workspace / "run.yaml"), max_steps=4)
    (workspace / "out" / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert [r["step"] for r in erniekit.train(str(workspace / "run.yaml"), max_steps=4).history] == [3, 4]
    assert (workspace / "out" / "abandoned-1" / "checkpoint-4" / "trainer_state.json").read_text() == "{"
    for step in (2, 4):
        (workspace / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("{")
    assert "none of the checkpoints" in fail()


def test_infinite_loss_names_step_and_parameter(fail, workspace):
    """An absurd learning rate: the first update throws the weights so far that the loss is no number."""
    message = fail("learning_rate=1.0e38", "lr_scheduler_type=constant")
    assert "step 2" in message and "learning_rate" in message and "train.jsonl" in message


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("stage=OCR-VL-SFT", "OCR-VL-SFT"),
        ("sep_parallel_degree=2", "context_parallel_degree with cp_comm_type: a2a"),
        ("use_fp8=True", "fp8: tensorwise"),
    ],
)
def test_what_is_not_built_yet_is_refused_before_anything_starts(fail, workspace, override, word):
    assert word in fail(override)
    assert not (workspace / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fine_tuning=LoRA", ["continue_training", "fine_tuning: Full"]),  # of a random start
        ("stage=DPO", ["train.jsonl:1", "DPO and RM train on pairs", "set stage: SFT"]),
        ("tensor_parallel_degree=3", ["tensor_parallel_degree: 3", "2 attention heads"]),
    ],
)
def test_what_does_not_go_together_is_refused(fail, override, words):
    message = fail(override)
    assert all(word in message for word in words), message


def test_evaluating_or_exporting_nothing(fail, workspace):
    assert "No valid checkpoint found" in fail(command="export")
