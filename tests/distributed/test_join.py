"""Ranks that were not started alike end at once, all of them, and name what differs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import equality
from support.adapters import attach_random
from support.worlds import World

from erniekit.build import load_model
from erniekit.checkpoint.peft_attach import save_adapter


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("same")
    equality.prepare(path)
    lines = (path / "train.jsonl").read_text().splitlines(keepends=True)
    (path / "edited.jsonl").write_text("".join([*lines[:-1], lines[-1].replace("19", "20")]))
    (path / "fewer.jsonl").write_text("".join(lines[:-1]))
    (path / "copy.jsonl").write_text("".join(lines))
    for name, rank in (("adapter", 3), ("wider", 4)):
        save_adapter(attach_random(load_model(path / "dense"), rank=rank), path / name)
    shutil.copytree(path / "adapter", path / "same_adapter")
    save_adapter(attach_random(load_model(path / "dense"), alpha=5.0), path / "other_adapter")
    return path


def start(keys, other):
    """A run as far as its first step, on the second rank with `other` keys; what it ended with."""
    from erniekit import config
    from erniekit.build import PreparedModel
    from erniekit.parallel import backend
    from erniekit.training import build
    from erniekit.training.run import join
    from erniekit.utils.errors import UserError

    cfg = config.load(None, keys | (other if backend.world().rank else {}), "train")
    models = []
    real = PreparedModel.build
    PreparedModel.build = lambda *args: models.append(args) or real(*args)
    try:
        build.build_run(cfg, join(cfg)).close()
    except UserError as error:
        return str(error), len(models)
    finally:
        PreparedModel.build = real
    return "", len(models)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"learning_rate": 0.5}, r"learning_rate: 0\.001 on rank 0, 0\.5 on rank 1"),
        ({"seed": 7}, "seed: 42 on rank 0, 7 on rank 1"),
        ({"max_grad_norm": 2.0}, r"max_grad_norm: 0\.5 on rank 0, 2\.0 on rank 1"),
        ({"max_seq_len": 48}, "max_seq_len: 64 on rank 0, 48 on rank 1"),
        ({"max_steps": 9}, "max_steps: 5 on rank 0, 9 on rank 1"),
        ({"temperature": 0.5}, r"temperature: 0\.95 on rank 0, 0\.5 on rank 1"),  # stages RL and GKD train with it
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree: 1 on rank 0, 2 on rank 1"),
        ({"output_dir": "elsewhere"}, 'output_dir: ".*" on rank 0, "elsewhere" on rank 1'),
        ({"train_dataset_path": "edited.jsonl"}, "content of train_dataset_path: "),
        ({"train_dataset_path": "fewer.jsonl"}, r"number of samples: \[108\] on rank 0, \[107\] on rank 1"),
        ({"train_dataset_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model_name_or_path": "untied"}, "model_name_or_path: config.json: "),
    ],
    ids=str,
)
def test_a_difference_ends_every_rank_before_a_weight_is_read(world2: World, directory: Path, other, words):
    other = {key: f"{directory}/{value}" if key.endswith("_path") else value for key, value in other.items()}
    results = world2.run(start, keys=equality.keys_for(str(directory), "dense", 2), other=other, timeout=60)
    for said, models in results:
        assert re.search(words, said) and models == 0
    assert "nowhere" in words or results[0] == results[1]


@pytest.mark.parametrize("other", ["other_adapter", "wider"])
def test_another_adapter_is_a_difference(world2: World, directory: Path, other: str):
    keys = equality.keys_for(str(directory), "dense", 2, continue_training=True, fine_tuning="LoRA")
    keys["lora_path"] = f"{directory}/adapter"
    same = world2.run(start, keys=keys, other={"lora_path": f"{directory}/same_adapter"})
    assert same == [("", 1), ("", 1)]
    for said, models in world2.run(start, keys=keys, other={"lora_path": f"{directory}/{other}"}, timeout=60):
        assert "content of the adapter's files: " in said and models == 0


def test_another_teacher_is_a_difference(world2: World, directory: Path, tmp_path: Path):
    """The hosts have the same path, and different files there."""
    keys = equality.keys_for(str(directory), "dense", 2, stage="GKD", continue_training=True)
    keys["teacher_model_name_or_path"] = str(tmp_path / "teacher")
    results = world2.run(start_with_teacher, keys=keys, teachers=[f"{directory}/dense", f"{directory}/untied"])
    for said, _ in results:
        assert "teacher_model_name_or_path: config.json: " in said


def start_with_teacher(keys, teachers):
    """`start`, where each rank finds another teacher at the path that all of them name."""
    from erniekit.parallel import backend
    from erniekit.training.recipes import gkd

    real = gkd.resolve_model
    gkd.resolve_model = lambda name, hub: Path(teachers[backend.world().rank])
    try:
        return start(keys, {})
    finally:
        gkd.resolve_model = real


def test_what_hosts_may_have_for_themselves_is_no_difference(world2: World, directory: Path):
    other = {"dataloader_num_workers": 1, "logging_steps": 7, "train_dataset_path": f"{directory}/copy.jsonl"}
    results = world2.run(start, keys=equality.keys_for(str(directory), "dense", 2), other=other)
    assert results == [("", 1), ("", 1)]


def test_every_key_but_those_of_one_host_is_compared():
    from erniekit.config.methods import METHODS
    from erniekit.config.per_host import PER_HOST, compared
    from erniekit.config.schema import fields

    assert set(fields()) >= PER_HOST
    assert {key for facts in METHODS.values() for key in facts.also_reads} <= set(compared("train", list(fields())))
    training = {"learning_rate", "seed", "max_steps", "num_train_epochs", "beta", "lora_rank", "moe_aux_loss_lambda"}
    assert not training & PER_HOST


def test_the_files_have_as_many_rows_as_the_test_says(directory: Path):
    assert [len((directory / name).read_text().splitlines()) for name in ("train.jsonl", "fewer.jsonl")] == [108, 107]
    assert all(json.loads(line) for line in (directory / "edited.jsonl").read_text().splitlines())
    assert (directory / "edited.jsonl").read_text() != (directory / "train.jsonl").read_text()
