"""Splitting changes the files and nothing in them."""

import dataclasses
import json

import numpy as np
import pytest
from support.streaming import model_of_many_tensors, peak_bytes

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.split import split, split_checkpoint
from erniekit.utils.bfloat16 import fp32_to_bf16
from erniekit.utils.errors import CheckpointError, ConfigError


def make(directory, metadata):
    directory.mkdir(parents=True)
    tensors = {f"any.name.{i}": fp32_to_bf16(np.full((10, 10), i, np.float32)) for i in range(6)}
    with Writer(directory, [(name, "U16", a.shape) for name, a in tensors.items()], "5GB", metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    (directory / "config.json").write_text('{"anything": 1}')
    (directory / "tokenizer.model").write_text("t")
    return tensors


def test_tensors_types_and_config_stay(tmp_path):
    tensors = make(tmp_path / "a", {"format": "np"})
    report = split_checkpoint(tmp_path / "a", tmp_path / "b", max_shard_size=450)
    assert (report.num_files, report.num_tensors, report.num_bytes) == (3, 6, 1200)
    reader = Reader(tmp_path / "b")
    assert reader.metadata == {"format": "np"} and set(reader.keys()) == set(tensors)
    for name, array in tensors.items():
        assert reader.info(name) == ("U16", (10, 10)) and np.array_equal(reader.read(name), array)
    assert all(file.stat().st_size < 1000 for file in (tmp_path / "b").glob("*.safetensors"))
    assert (tmp_path / "b" / "config.json").read_text() == '{"anything": 1}'
    assert (tmp_path / "b" / "tokenizer.model").read_text() == "t"
    split_checkpoint(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


def test_the_command_takes_the_newest_checkpoint(tmp_path):
    make(tmp_path / "checkpoint-7", {"format": "pt"})
    cfg = config.load(None, {"output_dir": str(tmp_path), "max_shard_size": "1KB"}, "split")
    assert split(cfg).num_files == 2
    index = json.loads((tmp_path / "split_export" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 6
    assert (tmp_path / "split_export" / "tokenizer.model").is_file()
    split(
        dataclasses.replace(
            cfg, copy_tokenizer=False, output_dir=str(tmp_path / "other"), checkpoint=str(tmp_path / "checkpoint-7")
        )
    )
    assert not (tmp_path / "other" / "split_export" / "tokenizer.model").exists()


def test_refusals(tmp_path):
    make(tmp_path / "a", {})
    with pytest.raises(CheckpointError, match="same directory"):
        split_checkpoint(tmp_path / "a", tmp_path / "a")
    with pytest.raises(CheckpointError, match="No valid checkpoint found"):
        split(config.load(None, {"output_dir": str(tmp_path)}, "split"))
    with pytest.raises(ConfigError, match="output_dir"):
        split(config.load(None, {"max_shard_size": 1}, "split"))


def test_memory_holds_about_two_tensors_whatever_the_model(tmp_path):
    total, largest = model_of_many_tensors(tmp_path / "a")
    peak = peak_bytes(lambda: split_checkpoint(tmp_path / "a", tmp_path / "b", max_shard_size="2MB"))
    assert total > 4 * largest and peak < 2.2 * largest, (peak, largest, total)
