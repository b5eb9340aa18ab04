"""Calibration data: what it becomes, and what is wrong with it."""

import json
import shutil

import numpy as np
import pytest
from support.tiny_directories import model_directory, write_lines
from support.vision_directories import picture_records, vision_model_directory

from erniekit import config
from erniekit.models.config import ModelConfig
from erniekit.quantize import calibration as module
from erniekit.quantize.calibration import CalibrationSource, read_calibration
from erniekit.utils.errors import CheckpointError, DataError

SENTENCE = "the cat sat on the mat and looked at the small red ball in the garden"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model"), weights=False)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(module.log, "warning", lines.append)
    return lines


def read(directory, path, length=32, samples=4, type="erniekit", **overrides):
    cfg = config.load(None, {"output_dir": "unused", **overrides}, "export")
    source = CalibrationSource(str(path), type, samples, length)
    return read_calibration(cfg, source, directory, ModelConfig.from_dir(directory))


def test_conversations_fill_rows_in_the_order_of_the_seed(directory, tmp_path):
    records = [{"src": [f"question {n}: {SENTENCE}"], "tgt": [SENTENCE]} for n in range(40)]
    path = write_lines(tmp_path / "a.jsonl", records)
    first, again = read(directory, path, 200), read(directory, path, 200)
    assert len(first.batches) == 4 and all(100 < batch.num_tokens <= 200 for batch in first.batches)
    assert first.identity == again.identity
    for one, other in zip(first.batches, again.batches, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
    other = read(directory, path, 200, seed=7)
    assert not all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first.batches, other.batches, strict=True))
    assert other.identity != first.identity


def test_text_records_and_plain_text(directory, tmp_path, said):
    path = write_lines(tmp_path / "a.jsonl", [{"text": " ".join([SENTENCE] * 3)}] * 20)
    assert read(directory, path, type="text").num_tokens > 64
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join([SENTENCE] * 50))
    rows = read(directory, plain)
    assert [batch.num_tokens for batch in rows.batches] == [32] * 4
    assert not said
    read(directory, plain, samples=4000)
    assert "asks for 4000: all" in said[0]


def test_what_is_wrong_is_named(directory, tmp_path, said):
    with pytest.raises(DataError, match=r"quantization_calibration_path: .*absent"):
        read(directory, tmp_path / "absent.jsonl")
    (tmp_path / "short.txt").write_text("the cat\n")
    with pytest.raises(DataError, match=r"short.txt has \d+ tokens; a model of width 32 needs at least 8"):
        read(directory, tmp_path / "short.txt")
    with pytest.raises(DataError, match=r"b.jsonl:1: "):
        read(directory, write_lines(tmp_path / "b.jsonl", [{"question": "x"}]))


def test_messages_name_the_keys_of_calibration(directory, tmp_path, caplog):
    """Not those of training, whose reader it uses."""
    path = write_lines(tmp_path / "a.jsonl", [{"src": [SENTENCE], "tgt": [SENTENCE]}] * 9)
    with pytest.raises(
        DataError, match=r"nothing is left to read: every sample was dropped .* the limit that they name"
    ):
        read(directory, path, length=2)
    assert f"calibration data: 9 samples from {path}" in caplog.text
    assert "fills quantization_calibration_length" in caplog.text
    assert "train data" not in caplog.text and "max_seq_len" not in caplog.text


def test_another_tokenizer(directory, tmp_path):
    """One with more tokens than the model."""
    values = json.loads((directory / "config.json").read_text())
    small = tmp_path / "small"
    small.mkdir()
    for file in directory.iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    (small / "config.json").write_text(json.dumps(values | {"vocab_size": 40}))
    (tmp_path / "a.txt").write_text(SENTENCE)
    with pytest.raises(CheckpointError, match="Use the tokenizer that belongs to this model"):
        read(small, tmp_path / "a.txt")


def test_a_tokenizer_that_is_not_the_models(directory, tmp_path, said):
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join([SENTENCE] * 50))
    other = shutil.copytree(directory, tmp_path / "other")
    read(directory, plain, tokenizer_name_or_path=str(other))
    assert not said
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    first, second = list(values["model"]["vocab"])[-2:]
    vocabulary = values["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    read(directory, plain, tokenizer_name_or_path=str(other))
    assert len(said) == 1 and "is another one than that of" in said[0]


def test_records_with_pictures(tmp_path):
    """Rows have both modalities, and the pixels of their pictures."""
    directory = vision_model_directory(tmp_path / "model")
    path = write_lines(tmp_path / "data.jsonl", picture_records(tmp_path))
    found = read(directory, path, length=256, type="messages")
    assert all({0, 1} <= set(batch.modality.tolist()) for batch in found.batches)
    assert all(len(batch.pictures.patches) for batch in found.batches)
