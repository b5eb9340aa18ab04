"""Who owns output_dir: what is refused before anything changes, going back, removing, and kills in the middle."""

import json
import os
import shutil
from pathlib import Path

import pytest

from erniekit import config
from erniekit.checkpoint.model_dir import find_checkpoint, list_checkpoints
from erniekit.checkpoint.run_record import FinalModel, RunRecord, read_record
from erniekit.parallel.process_group import Group
from erniekit.training import output_dir as module
from erniekit.training.output_dir import OutputDir
from erniekit.training.resume_checks import noted
from erniekit.training.state import TrainState, state_writer
from erniekit.utils.errors import CheckpointError, ConfigError, UserError


@pytest.fixture
def cfg_of(tmp_path: Path):
    """The configuration of a run in tmp_path/out; its base is tmp_path/base."""
    (tmp_path / "base").mkdir()

    def make(**keys: object):
        needed = {
            "model_name_or_path": str(tmp_path / "base"),
            "train_dataset_path": str(tmp_path / "train.jsonl"),
            "train_dataset_type": "erniekit",
            "output_dir": str(tmp_path / "out"),
            "fine_tuning": "Full",
            "max_steps": 6,
        }
        return config.load(None, needed | keys, "train")

    return make


def output(cfg) -> OutputDir:
    return OutputDir(cfg, Group((0,), 0))


def start(cfg, step: int = 0) -> None:
    """What a run does before its first step."""
    with output(cfg) as place:
        place.claim()
        place.begin(RunRecord(noted(place.cfg)), step, trains=True)


def put_model(directory: Path, content: str = "w") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    header = json.dumps({"__metadata__": {"content": content}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def put_checkpoint(cfg, step: int, out: Path | None = None) -> Path:
    directory = (out or Path(cfg.output_dir)) / f"checkpoint-{step}"
    put_model(directory, f"step {step}")
    state_writer(cfg, TrainState(step=step, identity=noted(cfg)))(directory)
    return directory


def put_run(cfg, steps=(2, 4, 6), final: bool = True) -> Path:
    """A run that ended after the last of `steps`."""
    out = Path(cfg.output_dir)
    start(cfg)
    for step in steps:
        put_checkpoint(cfg, step)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, (steps or (6,))[-1] + 1)]
    (out / "metrics.jsonl").write_text("".join(lines))
    (out / "summary.json").write_text("{}")
    if final:
        put_model(out, "final")
        with output(cfg) as place:
            place.record_final(FinalModel((steps or (6,))[-1], 1, 6, False))
    return out


def snapshot(directory: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
    return found


def refused(cfg, error=UserError) -> str:
    """The message; what is in the directory stays as it is to the last byte."""
    parent = Path(cfg.output_dir).parent
    before = snapshot(parent)
    with pytest.raises(error) as raised, output(cfg):
        pass
    assert snapshot(parent) == before
    return str(raised.value)


def names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints(out)]


# What is refused.


def test_overwriting_a_run_and_going_on_from_it_contradict_each_other(cfg_of):
    out = put_run(cfg_of())
    for source in (out / "checkpoint-2", out / "checkpoint-9"):
        message = refused(cfg_of(overwrite_output_dir=True, resume_from_checkpoint=str(source)))
        assert "resume_from_checkpoint" in message
    assert "overwrite_output_dir" in refused(
        cfg_of(overwrite_output_dir=True, resume_from_checkpoint=f"{out}/../out/checkpoint-4")
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_that_cannot_be_read_is_refused_before_anything_is_removed(cfg_of, tmp_path, overwrite):
    put_run(cfg_of())
    elsewhere = put_checkpoint(cfg_of(seed=7), 3, tmp_path / "elsewhere")
    keys = {"overwrite_output_dir": overwrite, "resume_from_checkpoint": str(elsewhere)}
    assert "seed" in refused(cfg_of(**keys), CheckpointError)
    (elsewhere / "trainer_state.json").write_text("{")
    assert "trainer_state.json" in refused(cfg_of(**keys), CheckpointError)
    shutil.rmtree(elsewhere)
    assert "resume_from_checkpoint: there is no directory" in refused(cfg_of(**keys), CheckpointError)
    if not overwrite:
        there = {"resume_from_checkpoint": cfg_of().output_dir}
        assert "Name one of them" in refused(cfg_of(**there), CheckpointError)


@pytest.mark.parametrize("steps", [(2, 4), ()], ids=["with checkpoints", "the final model alone"])
def test_another_runs_directory(cfg_of, steps):
    put_run(cfg_of(), steps)
    message = refused(cfg_of(seed=7, train_dataset_path="other.jsonl"), CheckpointError)
    assert "another run" in message and "seed" in message and "overwrite_output_dir" in message


def test_a_model_that_no_run_wrote(cfg_of, tmp_path):
    put_model(tmp_path / "out")
    assert "overwrite_output_dir: true" in refused(cfg_of(), CheckpointError)
    assert "no run wrote" in refused(cfg_of(overwrite_output_dir=True), CheckpointError)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("key", ["model_name_or_path", "lora_path"])
def test_the_base_models_own_directory(cfg_of, tmp_path, key, overwrite):
    put_model(tmp_path / "start")
    more = {"fine_tuning": "LoRA"} if key == "lora_path" else {}
    (tmp_path / "link").symlink_to("start")
    for name in ("start", "link", "base/../start"):
        keys = {key: str(tmp_path / "start"), "output_dir": str(tmp_path / name), "overwrite_output_dir": overwrite}
        assert f"is also {key}" in refused(cfg_of(**more, **keys), ConfigError)


@pytest.mark.parametrize("key", ["train_dataset_path", "eval_dataset_path"])
def test_a_directory_inside_the_data(cfg_of, tmp_path, key):
    """All files of a directory are read as data, so a resumed run would read its own; hidden ones are not."""
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "data", tmp_path):
        message = refused(cfg_of(**{key: str(path), "output_dir": str(tmp_path / "data" / "runs" / "a")}), ConfigError)
        assert f"is inside {key}: {path}, and every file of a directory is read as data" in message
    for elsewhere in ("data/.runs/a", "data-runs"):
        with output(cfg_of(**{key: str(tmp_path / "data"), "output_dir": str(tmp_path / elsewhere)})) as place:
            place.claim()


def test_overwriting_what_the_run_starts_from(cfg_of):
    out = put_run(cfg_of())
    base = {"model_name_or_path": str(out / "checkpoint-6"), "overwrite_output_dir": True}
    assert "would remove model_name_or_path" in refused(cfg_of(**base), ConfigError)


def test_the_root_of_the_file_system(cfg_of):
    for name in ("/", "//tmp/.."):
        with pytest.raises(ConfigError, match="is the root of the file system"), output(cfg_of(output_dir=name)):
            pass


def test_a_run_that_is_not_to_resume_does_not_replace_its_own_model(cfg_of):
    put_run(cfg_of(), ())
    assert "overwrite_output_dir" in refused(cfg_of(resume_from_checkpoint="none"), CheckpointError)


@pytest.mark.parametrize("steps", [(), (2,)])
def test_other_data_continue_a_run_only_where_it_has_a_checkpoint(cfg_of, steps):
    put_run(cfg_of(), steps)
    message = refused(cfg_of(seed=7), CheckpointError)
    assert "seed: 42 there, 7 here" in message and ("ignore_data_skip" in message) == bool(steps)


def test_the_other_kind(cfg_of):
    put_run(cfg_of())
    assert "holds another run" in refused(cfg_of(fine_tuning="LoRA"), CheckpointError)
    start(cfg_of(fine_tuning="LoRA", overwrite_output_dir=True))  # what was there is removed


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "run.json", "model.safetensors", "config.json"]
)
def test_a_directory_in_the_place_of_a_file(cfg_of, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert f"{name} is not a file" in refused(cfg_of())


def test_a_file_in_the_place_of_a_checkpoint(cfg_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-2").write_text("the user's")
    assert "checkpoint-2 is not a directory" in refused(cfg_of())


def test_a_broken_record(cfg_of):
    out = put_run(cfg_of())
    (out / "run.json").write_text('{"identity": [')
    assert "run.json" in refused(cfg_of(), CheckpointError)


def test_no_checkpoint_that_is_whole(cfg_of):
    out = put_run(cfg_of(), final=False)
    for path in list_checkpoints(out):
        (path / "model.safetensors").unlink()
    assert "none of the checkpoints" in refused(cfg_of(), CheckpointError)


# What is taken.


def test_the_same_run_goes_on_from_the_newest_whole_checkpoint(cfg_of, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.log, "warning", said.append)
    out = put_run(cfg_of())
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    with output(cfg_of(max_steps=9)) as place:
        assert place.claim().source == out / "checkpoint-4"
    assert len(said) == 1 and "checkpoint-6 is not whole" in said[0] and "goes back to checkpoint-4" in said[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "rollout_state.json", "rollout.npz"])
def test_a_small_file_that_is_cut_short_is_damage_too(cfg_of, name: str):
    out = put_run(cfg_of())
    (out / "checkpoint-6" / name).write_bytes(b'PK\x03\x04{"a": 1')
    with output(cfg_of(max_steps=9)) as place:
        assert place.claim().source == out / "checkpoint-4"


def test_damaged_checkpoints_are_set_aside_and_no_longer_count(cfg_of):
    """Otherwise save_total_limit would keep them as the newest ones and delete what the run goes on to save."""
    out = put_run(cfg_of())
    (out / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    start(cfg_of(max_steps=9), 4)
    assert names(out) == ["checkpoint-2", "checkpoint-4"]
    assert (out / "abandoned-1" / "checkpoint-6" / "model.safetensors").read_bytes() == b"half"
    assert len((out / "abandoned-1" / "metrics.jsonl").read_text().splitlines()) == 6
    start(cfg_of(max_steps=9), 4)
    assert not (out / "abandoned-2").exists()


def test_a_run_without_a_record_is_known_by_its_checkpoints(cfg_of):
    out = put_run(cfg_of())
    (out / "run.json").unlink()
    assert "another run" in refused(cfg_of(seed=7))
    start(cfg_of(), 6)
    assert read_record(out).identity == json.loads(json.dumps(noted(cfg_of())))


def test_a_damaged_newest_checkpoint_does_not_bar_the_way_back(cfg_of):
    out = put_run(cfg_of())
    (out / "checkpoint-6" / "trainer_state.json").write_text("{")
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-4")), 4)
    assert names(out) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_saved_nothing_does_not_bar_the_way(cfg_of):
    """Such as one whose data was wrong."""
    start(cfg_of())
    start(cfg_of(seed=7))
    assert read_record(Path(cfg_of().output_dir)).identity["seed"] == 7


def test_config_yaml_is_of_a_run_that_trains(cfg_of):
    out = put_run(cfg_of())
    before = (out / "config.yaml").read_text()
    with output(cfg_of(learning_rate=0.5)) as place:
        place.begin(RunRecord(noted(place.cfg)), 6, trains=False)
    assert (out / "config.yaml").read_text() == before


# Going back.


def test_going_back_sets_later_checkpoints_aside(cfg_of, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.log, "info", said.append)
    out = put_run(cfg_of())
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-2")), 2)
    assert names(out) == ["checkpoint-2"]
    assert names(out / "abandoned-1") == ["checkpoint-4", "checkpoint-6"]
    lines = (out / "abandoned-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len(said) == 1 and "checkpoint-4, checkpoint-6" in said[0] and "save_total_limit" in said[0]
    put_checkpoint(cfg_of(), 3)
    assert find_checkpoint(out) == out / "checkpoint-3", "not the final model of the branch that was left"
    with output(cfg_of()) as place:
        assert place.claim().source == out / "checkpoint-3" and place.claim().final is None
    # A second time, and to what was set aside.
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-2")), 2)
    assert names(out / "abandoned-2") == ["checkpoint-3"]
    start(cfg_of(resume_from_checkpoint=str(out / "abandoned-1" / "checkpoint-4")), 4)
    assert names(out) == [] and names(out / "abandoned-3") == ["checkpoint-2"]


def test_the_metrics_are_those_of_the_run_that_the_checkpoint_is_of(cfg_of, tmp_path):
    def put_metrics(directory: Path, losses: list[int]) -> None:
        lines = [json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses, 1)]
        (directory / "metrics.jsonl").write_text("".join(lines))

    def losses(directory: Path) -> list[int]:
        return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]

    out = put_run(cfg_of())
    put_metrics(out, [10, 11, 12, 13, 14, 15])
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-2")), 2)
    put_metrics(out, [10, 11, 22, 23])
    put_checkpoint(cfg_of(), 4)
    start(cfg_of(resume_from_checkpoint=str(out / "abandoned-1" / "checkpoint-4")), 4)
    assert losses(out) == [10, 11, 12, 13] and losses(out / "abandoned-2") == [10, 11, 22, 23]
    # From another directory, also where this one holds no checkpoint.
    put_checkpoint(cfg_of(), 2, tmp_path / "far")
    put_metrics(tmp_path / "far", [30, 31, 32])
    for number in (3, 4):
        start(cfg_of(resume_from_checkpoint=str(tmp_path / "far" / "checkpoint-2")), 2)
        assert losses(out) == [30, 31] and (out / f"abandoned-{number}" / "metrics.jsonl").is_file()
    (tmp_path / "far" / "metrics.jsonl").unlink()
    start(cfg_of(resume_from_checkpoint=str(tmp_path / "far" / "checkpoint-2")), 2)
    assert not (out / "metrics.jsonl").exists() and losses(out / "abandoned-5") == [30, 31]


def test_going_on_from_the_newest_sets_nothing_aside(cfg_of):
    out = put_run(cfg_of())
    for source in ("auto", str(out / "checkpoint-6")):
        start(cfg_of(resume_from_checkpoint=source), 6)
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert find_checkpoint(out) == out


def test_a_linked_checkpoint(cfg_of, tmp_path):
    out = put_run(cfg_of())
    (out / "checkpoint-4").rename(tmp_path / "far")
    (out / "checkpoint-4").symlink_to("../far")
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-2")), 2)
    assert "step 4" in (out / "abandoned-1" / "checkpoint-4" / "model.safetensors").read_text()
    (out / "checkpoint-9").symlink_to("../far")
    start(cfg_of(overwrite_output_dir=True))
    assert names(out) == [] and "step 4" in (tmp_path / "far" / "model.safetensors").read_text()


# Removing.


def test_overwriting_removes_the_run_and_nothing_else(cfg_of, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module.log, "info", said.append)
    out = put_run(cfg_of())
    start(cfg_of(resume_from_checkpoint=str(out / "checkpoint-4")), 4)
    for name in ("notes.txt", "README.md", "checkpoint-best"):
        (out / name).write_text("mine")
    old = read_record(out).id
    for name in ("samples.jsonl", "reward.png", "profile.json", "trackers.json"):
        (out / name).write_text("of the old run")
    put_model(out / "profile.txt")  # a directory of that name is the user's
    start(cfg_of(seed=7, overwrite_output_dir=True))
    left = sorted(path.name for path in out.iterdir())
    assert left == ["README.md", "checkpoint-best", "config.yaml", "notes.txt", "profile.txt", "run.json"]
    assert read_record(out).id != old and read_record(out).final_model is None
    assert "removed 2 checkpoints, the final model, what was set aside" in said[-1]


def test_overwriting_without_a_run_keeps_the_files_that_are_there(cfg_of, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "config.yaml", "config.json"):
        (tmp_path / "out" / name).write_text("mine")
    start(cfg_of(overwrite_output_dir=True))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


class Killed(BaseException):
    """In the place of SIGKILL: nothing may catch it and mend."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th call that changes a directory, counted from 0, is not made any more."""
    calls = 0

    def counted(real):
        def call(*args, **keys):
            nonlocal calls
            calls += 1
            if calls > number:
                raise Killed
            return real(*args, **keys)

        return call

    # pathlib calls these, and atomic too.
    for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "symlink"):
        monkeypatch.setattr(os, name, counted(vars(os)[name]))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def killed_everywhere(tmp_path: Path, cfg, step: int, check) -> int:
    """Begin a run with a kill at each change of the directory in turn; `check` looks at what a kill left, and the same
    command is then given again. Returns the number of changes.
    """
    out = Path(cfg.output_dir)
    kept = tmp_path / "kept"
    shutil.copytree(out, kept, symlinks=True)
    number = 0
    while True:
        shutil.rmtree(out)
        shutil.copytree(kept, out, symlinks=True)
        place = output(cfg)
        place.claim()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                place.begin(RunRecord(noted(place.cfg)), step, trains=True)
                done = True
            except Killed:
                done = False
        place.lock.release()
        if done:
            return number
        check(out)
        start(cfg, step)
        assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
        check(out, done=True)
        number += 1


def test_a_kill_anywhere_while_a_run_is_removed(cfg_of, tmp_path):
    out = put_run(cfg_of())
    cfg = cfg_of(seed=7, overwrite_output_dir=True)

    def check(out: Path, done: bool = False) -> None:
        for path in list_checkpoints(out):
            assert {file.name for file in path.iterdir()} >= {"trainer_state.json", "config.json", "model.safetensors"}
        assert not (out / "model.safetensors").exists() or (out / "checkpoint-6").exists()
        if done:
            assert names(out) == [] and not (out / "config.json").exists() and read_record(out).identity["seed"] == 7
        elif list_checkpoints(out):
            # The old run can go on, with the record of its steps.
            with output(cfg_of()) as place:
                assert place.claim().source == out / "checkpoint-6"
            assert len((out / "metrics.jsonl").read_text().splitlines()) == 6

    assert killed_everywhere(tmp_path, cfg, 0, check) > 8
    assert names(out) == []


def test_a_kill_anywhere_while_a_run_goes_back(cfg_of, tmp_path):
    out = put_run(cfg_of())
    cfg = cfg_of(resume_from_checkpoint=str(out / "checkpoint-2"))

    def check(out: Path, done: bool = False) -> None:
        aside = [path for place in out.glob("abandoned-*") for path in list_checkpoints(place)]
        everything = sorted(path.name for path in [*list_checkpoints(out), *aside])
        assert everything == ["checkpoint-2", "checkpoint-4", "checkpoint-6"], "each is whole in one place"
        assert all((path / "trainer_state.json").is_file() for path in [*list_checkpoints(out), *aside])
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 6  # shortened when the run reports
        if done:
            assert names(out) == ["checkpoint-2"] and find_checkpoint(out) == out / "checkpoint-2"

    assert killed_everywhere(tmp_path, cfg, 2, check) >= 4


def test_a_restart_before_the_run_has_begun_still_goes_back(cfg_of):
    """The agent leaves the keys as they are until run.json tells of a start."""
    from erniekit.checkpoint.run_record import start_id

    out = put_run(cfg_of())
    cfg = cfg_of(resume_from_checkpoint=str(out / "checkpoint-2"))
    before = start_id(out)
    place = output(cfg)
    place.claim()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 2)  # the branch is noted, the checkpoints are not yet set aside
        with pytest.raises(Killed):
            place.begin(RunRecord(noted(place.cfg)), 2, trains=True)
    place.lock.release()
    assert start_id(out) == before
    start(cfg, 2)
    assert start_id(out) != before


def test_the_record_survives_fields_of_a_later_version(tmp_path):
    RunRecord({"seed": 1}).write(tmp_path)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"later": 1}))
    assert read_record(tmp_path).identity == {"seed": 1}
