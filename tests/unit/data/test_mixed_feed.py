"""Rows with pictures and rows of text by turns: which comes when, resuming, ranks, and where the stream ends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_runs import config, steps
from support.pictures import vision_directory, write_picture
from support.tiny_directories import write_lines

from erniekit.data.chat.tokenizer import Tokenizer, load_tokenizer
from erniekit.data.loader import Loader, build_loader
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.vision.options import vision_spec
from erniekit.data.vision.processor_files import read_settings
from erniekit.data.vision.template import load_vision_template
from erniekit.utils.errors import DataError

PICTURES = 14


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's tokenizer and processor files, 14 records with pictures and 5 of text."""
    directory = tmp_path_factory.mktemp("mixed")
    vision_directory(directory / "vl", 28 * 28, 28 * 28)
    records: list[dict[str, Any]] = []
    for number in range(PICTURES):
        write_picture(directory / f"{number}.png", 28, 28, seed=number)
        messages = [{"role": "user", "content": f"<image>{number}"}, {"role": "assistant", "content": f"{number}"}]
        records.append({"messages": messages, "images": [f"{number}.png"]})
    write_lines(directory / "pictures.jsonl", records)
    write_lines(directory / "text.jsonl", [{"src": f"{number}", "tgt": f"{number}"} for number in range(5)])
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory / "vl")


def build(directory: Path, tokenizer: Tokenizer, rank: int = 0, world: int = 1, **keys: Any) -> Loader:
    keys = {
        "stage": "VL-SFT",
        "train_dataset_type": "messages",
        "text_dataset_path": str(directory / "text.jsonl"),
        "packing": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        **keys,
    }
    cfg = config(directory / "pictures.jsonl", **keys)
    spec = vision_spec(cfg, read_settings(directory / "vl"))
    template = load_vision_template(tokenizer, "vl")
    return build_loader(cfg, tokenizer, "train", rank, world, template, vision=spec)


def kind(batch: PackedBatch) -> str:
    """p for a row with pictures, t for one of text, in the order of the rows."""
    ends = np.cumsum(batch.row_lengths)
    return "".join(
        "p" if batch.modality[end - n : end].any() else "t" for end, n in zip(ends, batch.row_lengths, strict=True)
    )


def kinds(loader: Loader) -> list[list[str]]:
    with loader:
        return [[kind(batch) for batch in step] for step in steps(loader)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [["p", "t"]] * PICTURES),
        ({"modality_ratio": "2,1"}, [["p", "p"], ["t", "p"], ["p", "t"]] * 5),
        ({"modality_interleave": "batch"}, [["p", "p"], ["t", "t"]] * 7),
        ({"batch_size": 2}, [["pp", "tt"]] * 7),
        ({"batch_size": 2, "modality_interleave": "mixed"}, [["pt", "pt"]] * 7),
        ({"text_dataset_path": None}, [["p", "p"]] * 7),
    ],
)
def test_whose_turn_it_is(
    directory: Path, tokenizer: Tokenizer, keys: dict[str, Any], expected: list[list[str]]
) -> None:
    found = kinds(build(directory, tokenizer, **keys))
    assert found[:-1] == expected[: len(found) - 1] and len(found) <= len(expected)
    assert "".join(batch for step in found for batch in step).count("p") == PICTURES


@pytest.mark.parametrize("keys", [{}, {"modality_ratio": "2,3"}, {"modality_interleave": "batch"}, {"batch_size": 2}])
def test_the_rows_are_counted_before_they_are_read(directory: Path, tokenizer: Tokenizer, keys: dict[str, Any]) -> None:
    with build(directory, tokenizer, **keys, num_train_epochs=2) as loader:
        expected = loader.rows_left()
        loader.next_step()
        left = loader.rows_left()
        rows = [len(batch.row_lengths) for step in steps(loader) for batch in step]
    assert loader.exact and sum(rows) == left
    assert expected == left + 2 * (keys.get("batch_size", 1))


def test_a_resumed_run_has_the_same_rows(directory: Path, tokenizer: Tokenizer) -> None:
    def sources(loader: Loader) -> list[list[str]]:
        return [[source for batch in step for source in batch.sources] for step in steps(loader)]

    keys: dict[str, Any] = {"modality_ratio": "2,1", "num_train_epochs": 2}
    with build(directory, tokenizer, **keys) as loader:
        whole = sources(loader)
    for workers in (0, 1):
        with build(directory, tokenizer, **keys) as loader:
            for _ in range(5):
                loader.next_step()
            state, report = loader.state_dict(), loader.report()
        assert report["rows"] + report["text_rows"] == 10
        with build(directory, tokenizer, **keys, dataloader_num_workers=workers) as loader:
            loader.load_state_dict(state)
            assert sources(loader) == whole[5:]
    with (
        build(directory, tokenizer, num_train_epochs=2) as loader,
        pytest.raises(DataError, match="modality_ratio was"),
    ):
        loader.load_state_dict(state)


@pytest.mark.parametrize(("interleave", "whole"), [("mixed", ["p", "t"]), ("acc", ["p", "p"])])
def test_ranks(directory: Path, tokenizer: Tokenizer, interleave: str, whole: list[str]) -> None:
    """With acc a microbatch has one modality on all ranks; with mixed the rows are those of one rank."""
    keys: dict[str, Any] = {"gradient_accumulation_steps": 1, "modality_interleave": interleave}
    found = [kinds(build(directory, tokenizer, rank, 2, **keys)) for rank in (0, 1)]
    assert [step[0] for step in (found[0][0], found[1][0])] == whole
    if interleave == "mixed":
        alone = kinds(build(directory, tokenizer, gradient_accumulation_steps=2, modality_interleave="mixed"))
        assert alone[:-1] == [[a[0], b[0]] for a, b in zip(*found, strict=True)][:-1]
