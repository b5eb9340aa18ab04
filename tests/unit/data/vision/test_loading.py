"""The loader with pictures: batches, workers, ranks, resuming, and pictures that cannot be decoded."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.data_runs import config, write
from support.pictures import vision_directory, write_picture

from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.packed_batch import IGNORE, Modality
from erniekit.data.records.errors import MissingPackage
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.utils.errors import DataError

LIMITS = PixelLimits(56 * 56, 112 * 112)
SPEC = VisionSpec(replace(ProcessorSettings(), images=LIMITS, videos=LIMITS))
COLUMNS = ("input_ids", "labels", "position_ids", "segment_ids", "modality")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(vision_directory(tmp_path_factory.mktemp("model") / "vl"))


@pytest.fixture
def data(tmp_path):
    """A file of 24 records with zero to two pictures of several sizes, one with a video."""
    records = []
    for number in range(24):
        names = [f"{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(names):
            write_picture(tmp_path / name, 40 + 9 * number, 70 + 20 * i, seed=number)
        content = "<image>" * len(names) + f"What is number {number}?"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(number)}]
        records.append({"messages": messages, "images": names})
    for frame in range(4):
        write_picture(tmp_path / "clip" / f"{frame}.png", 60, 60, seed=frame)
    records[5]["messages"][0]["content"] += "<video>"
    records[5]["videos"] = ["clip"]
    return write(tmp_path / "train.jsonl", records)


def build(path, tokenizer, rank=0, world=1, **keys):
    keys = {"train_dataset_type": "messages", "max_seq_len": 200, "chat_template": "vl", **keys}
    keys = {"gradient_accumulation_steps": 1, **keys}
    return build_loader(config(path, **keys), tokenizer, "train", rank, world, vision=SPEC)


def steps(loader):
    found = []
    with loader:
        while True:
            try:
                found.append(loader.next_step())
            except StopIteration:
                return found


def assert_equal(ours, theirs):
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    for name in ("patches", "grid", "first_tokens", "documents"):
        np.testing.assert_array_equal(getattr(ours.pictures, name), getattr(theirs.pictures, name))
    assert ours.sources == theirs.sources


def test_batches_hold_the_patches_of_their_pictures(data, tokenizer):
    placeholders = {tokenizer.token_id(f"<|{kind}_PLACEHOLDER|>") for kind in ("IMAGE", "VIDEO")}
    pictures = videos = 0
    for batch in (batch for step in steps(build(data, tokenizer)) for batch in step):
        media = batch.pictures
        assert len(media.patches) == media.num_patches and not media.sources
        assert media.patches.shape == (media.grid.prod(axis=1).sum(), 588) if len(media) else True
        inside = np.isin(batch.input_ids, list(placeholders))
        merged = np.where(batch.modality[media.first_tokens] == Modality.VIDEO, 8, 4)
        assert inside.sum() == (media.grid.prod(axis=1) // merged).sum()
        for first, number in zip(media.first_tokens, media.documents, strict=True):
            assert inside[first] and not inside[first - 1] and batch.segment_ids[first] == number
        assert (batch.labels[batch.modality > 0] == IGNORE).all()
        if len(media):
            assert batch.position_ids.shape == (batch.num_tokens, 3)
            starts = np.flatnonzero(np.diff(batch.segment_ids, prepend=-1))
            assert (batch.position_ids[starts] == 0).all()
        pictures += int((batch.modality[media.first_tokens] == Modality.IMAGE).sum())
        videos += int((batch.modality[media.first_tokens] == Modality.VIDEO).sum())
    assert (pictures, videos) == (24, 1)


def test_workers_change_nothing(data, tokenizer):
    alone = steps(build(data, tokenizer))
    shared = steps(build(data, tokenizer, dataloader_num_workers=2))
    assert len(alone) == len(shared) > 1
    for ours, theirs in zip(alone, shared, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)


def test_ranks_share_the_rows_and_decode_their_own(data, tokenizer):
    [whole, *_] = steps(build(data, tokenizer, batch_size=2, gradient_accumulation_steps=1))
    parts = [
        steps(build(data, tokenizer, rank, 2, batch_size=1, gradient_accumulation_steps=1))[0][0] for rank in (0, 1)
    ]
    np.testing.assert_array_equal(whole[0].input_ids, np.concatenate([part.input_ids for part in parts]))
    np.testing.assert_array_equal(
        whole[0].pictures.patches, np.concatenate([part.pictures.patches for part in parts if len(part.pictures)])
    )


def test_a_resumed_run_has_the_same_pictures(data, tokenizer):
    every = steps(build(data, tokenizer))
    first = build(data, tokenizer)
    with first:
        first.next_step()
        state = first.state_dict()
    second = build(data, tokenizer, dataloader_num_workers=1)
    second.load_state_dict(state)
    for ours, theirs in zip(steps(second), every[1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)


def test_rows_are_counted_without_decoding(data, tokenizer, tmp_path):
    with build(data, tokenizer) as loader:
        expected = loader.rows_left()
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:100])  # the header alone
    with build(data, tokenizer) as loader:
        assert loader.rows_left() == expected and loader.exact


def test_what_a_saved_place_depends_on(data, tokenizer):
    with build(data, tokenizer) as loader:
        state = loader.state_dict()
    other = replace(SPEC, settings=replace(SPEC.settings, images=PixelLimits(56 * 56, 200 * 200)))
    keys = {"train_dataset_type": "messages", "max_seq_len": 200, "chat_template": "vl"}
    changed = build_loader(config(data, **keys), tokenizer, vision=other)
    with changed, pytest.raises(DataError, match="pictures was"):
        changed.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_ends_the_run_or_loses_its_loss(data, tokenizer, tmp_path, workers):
    path = tmp_path / "4-0.png"
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(DataError, match=r"train.jsonl:5: .*4-0.png cannot be decoded.*on_bad_line: skip"):
        steps(build(data, tokenizer, dataloader_num_workers=workers))
    skipped = steps(build(data, tokenizer, on_bad_line="skip", dataloader_num_workers=workers))
    [batch] = [b for step in skipped for b in step if any(source.endswith(":5") for source in b.sources)]
    number = next(i for i, source in enumerate(batch.sources) if source.endswith(":5"))
    assert (batch.labels[batch.segment_ids == number] == IGNORE).all()
    assert (batch.labels[batch.segment_ids != number] != IGNORE).any()
    assert len(batch.pictures.patches) == batch.pictures.num_patches


def test_records_are_checked_when_the_data_is_opened(data, tokenizer):
    with data.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]}\n')
    with pytest.raises(DataError, match=r"train.jsonl:25: 1 <image> tag for 0 images"):
        build(data, tokenizer)
    with build(data, tokenizer, on_bad_line="skip") as loader:
        assert loader.report()["bad_lines"] == 1


def test_other_types_are_named(data, tokenizer):
    with pytest.raises(DataError, match="this record is of type messages, not text"):
        build(data, tokenizer, train_dataset_type="text")


def test_the_report_counts_what_became_of_pictures(data, tokenizer, tmp_path):
    path = tmp_path / "4-0.png"
    path.write_bytes(path.read_bytes()[:120])
    with build(data, tokenizer, on_bad_line="skip") as loader:
        seen = [batch.pictures for step in steps(loader) for batch in step]
        report = loader.report()
    assert report["undecodable"] == 1 and report["shrunk"] == 0
    assert report["pictures"] == sum(len(table) for table in seen) == 25
    assert report["patches"] == sum(table.num_patches for table in seen)
    [(note, count)] = report["media_notes"].items()
    assert "frames of a video come without times" in note and count == 1


def test_samples_with_smaller_pictures_are_counted(data, tokenizer, caplog):
    keys = {"train_dataset_type": "messages", "chat_template": "vl", "max_seq_len": 48, "packing": False}
    spec = replace(SPEC, truncation="shrink")
    with build_loader(config(data, **keys), tokenizer, vision=spec) as loader:
        encoded = list(loader.feed.encode(range(24)))
        loader.rows_left()
        loader.next_step()
        report = loader.report()
    shrunk = sum(record.shrunk for record in encoded)
    assert 0 < shrunk < 24 and report["shrunk"] == shrunk  # all of them are in the packer's window
    assert report["dropped"] == sum(bool(record.dropped) for record in encoded)
    assert report["cut"] == sum(record.cut for record in encoded)


@pytest.mark.parametrize("keys", [{"num_train_epochs": 1}, {"max_steps": 3}])
def test_the_largest_row_is_said_before_training(data, tokenizer, capsys, keys):
    with build(data, tokenizer, **keys) as loader:
        loader.announce()
    said = capsys.readouterr().err
    rows = [batch for step in steps(build(data, tokenizer, batch_size=1)) for batch in step]
    tokens, patches = max(row.num_tokens for row in rows), max(row.pictures.num_patches for row in rows)
    assert f"the largest rows of an epoch have {tokens:,} tokens and {patches:,} patches of pictures" in said
    assert "24 samples measured" in said


def test_a_missing_decoder_stops_the_run_when_data_are_opened(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    # Both, since `from package import module` takes the attribute where the module was imported before.
    monkeypatch.delitem(sys.modules, "erniekit.data.vision.video_file", raising=False)
    monkeypatch.delattr("erniekit.data.vision.video_file", raising=False)
    (tmp_path / "clip.mp4").write_bytes(b"...")
    talk = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "x"}]
    with data.open("a") as file:
        file.write(json.dumps({"messages": talk, "videos": ["clip.mp4"]}) + "\n")
    for on_bad_line in ("error", "skip"):
        with pytest.raises(MissingPackage, match="pip install 'erniekit"):
            build(data, tokenizer, on_bad_line=on_bad_line)
