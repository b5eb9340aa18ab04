"""Pretraining text with pictures, and pairs of answers about pictures, as documents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import vision_directory, write_picture

from erniekit.data.chat.encode import Encoded
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.packed_batch import IGNORE, Document, Modality, make_row
from erniekit.data.vision.encode import VisionEncoder, VisionSpec
from erniekit.data.vision.processor_files import read_settings
from erniekit.data.vision.template import load_vision_template
from erniekit.utils.errors import DataError

SIDE, TOKENS = 84, 11  # a picture of 84 x 84 pixels has 9 tokens, and its tags


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("documents")
    vision_directory(directory / "vl", 28 * 28, SIDE * SIDE)
    for name in ("a", "b"):
        write_picture(directory / f"{name}.png", SIDE, SIDE, seed=ord(name))
    return directory


def encode(directory: Path, type_name: str, record: dict[str, Any], max_seq_len: int = 64, **spec: Any) -> Encoded:
    template = load_vision_template(load_tokenizer(directory / "vl"), "vl")
    encoder = VisionEncoder(template, VisionSpec(read_settings(directory / "vl"), **spec), max_seq_len)
    return encoder(f"{type_name} (VL)", record, f"{directory}/data.jsonl:1")


def targets(documents: list[Document]) -> list[int]:
    return [int(label) for document in documents for label in document.labels if label != IGNORE]


@pytest.mark.parametrize("max_seq_len", [64, 23, 12, 11])
def test_every_token_of_a_text_is_a_target_once_and_no_picture_is_divided(directory: Path, max_seq_len: int) -> None:
    tokenizer = load_tokenizer(directory / "vl")
    texts = ["one two", " three <s> four", " five"]
    record = {"text": "<image>".join(texts), "images": ["a.png", "b.png"]}
    encoded = encode(directory, "text", record, max_seq_len)
    text = [i for part in texts for i in tokenizer.encode_plain(part)]
    found = targets(encoded.documents)
    assert found == [*text[1:], tokenizer.eos_id]
    pictures = [document.pictures for document in encoded.documents if document.pictures is not None]
    assert sum(len(p.grid) for p in pictures) == 2
    for document in encoded.documents:
        assert len(document.ids) <= max_seq_len
        if document.pictures is not None:
            inside = document.pictures.modality != Modality.TEXT
            assert inside.sum() == TOKENS * len(document.pictures.grid)
            assert (document.labels[np.flatnonzero(inside)[:-1]] != tokenizer.eos_id).all()
            assert not np.isin(document.labels, document.ids[inside]).any()


def test_a_picture_that_is_longer_than_a_sequence(directory: Path) -> None:
    record = {"text": "one<image>two", "images": ["a.png"]}
    dropped = encode(directory, "text", record, 10)
    assert "a picture has 11 tokens, more than max_seq_len 10" in dropped.dropped and dropped.needed == 11
    with pytest.raises(DataError, match=r"data.jsonl:1: a picture has 11 tokens.*set max_seq_len to 11"):
        encode(directory, "text", record, 10, truncation="error")
    smaller = encode(directory, "text", record, 10, truncation="shrink")
    assert not smaller.dropped and all(len(document.ids) <= 10 for document in smaller.documents)
    assert smaller.shrunk and not encode(directory, "text", record, 11, truncation="shrink").shrunk


def test_a_picture_that_fits_is_not_made_smaller_beside_one_that_does_not(directory: Path) -> None:
    """Also where max_pixels is no multiple of a token's pixels."""
    write_picture(directory / "c.png", 112, 112, seed=1)
    record = {"text": "<image>one two<image>three", "images": ["a.png", "c.png"]}
    settings = read_settings(directory / "vl")
    settings = replace(settings, images=settings.images._replace(max_pixels=SIDE * SIDE + 784 * 7 + 99))
    template = load_vision_template(load_tokenizer(directory / "vl"), "vl")
    encoder = VisionEncoder(template, VisionSpec(settings, "shrink"), 15)
    plans = [
        p for d in encoder("text (VL)", record, f"{directory}/x:1").documents if d.pictures for p in d.pictures.sources
    ]
    assert plans[0].geometry.tokens == 9 and plans[0].limits == settings.images
    assert plans[1].geometry.tokens <= 13 and plans[1].limits != settings.images


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_truncation_error_stops_the_run_whatever_happens_to_bad_lines(directory: Path, on_bad_line: str) -> None:
    record = {"text": "one<image>two", "images": ["a.png"]}
    template = load_vision_template(load_tokenizer(directory / "vl"), "vl")
    encoder = VisionEncoder(template, VisionSpec(read_settings(directory / "vl"), "error"), 10, on_bad_line)
    with pytest.raises(DataError, match="a picture has 11 tokens"):
        encoder("text (VL)", record, f"{directory}/x:1")


@pytest.mark.parametrize(
    ("type_name", "record"),
    [
        ("messages (DPO)", {"messages": [{"role": "user", "content": "<image>which?"}]}),
        ("sharegpt (DPO)", {"conversations": [{"from": "human", "value": "<image>which?"}]}),
        ("alpaca (DPO)", {"instruction": "<image>which?"}),
    ],
)
def test_both_answers_see_the_prompts_picture(directory: Path, type_name: str, record: dict[str, Any]) -> None:
    """Each half of the pair is what the conversation with that answer alone is: ids, labels, positions, modality."""
    record = {**record, "images": ["a.png"], "chosen": "good", "rejected": "not so good"}
    [pair] = encode(directory, type_name, record).documents
    assert pair.pair is not None and pair.pictures is not None
    row = make_row([pair], ["here:1"])
    prompt = pair.pair.prompt
    starts = {"good": prompt, "not so good": prompt + pair.pair.chosen}
    for answer, start in starts.items():
        messages = [{"role": "user", "content": "<image>which?"}, {"role": "assistant", "content": answer}]
        [alone] = encode(directory, "messages", {"messages": messages, "images": ["a.png"]}).documents
        assert alone.pictures is not None
        tokens = np.r_[:prompt, start : start + len(alone.ids) - prompt]
        np.testing.assert_array_equal(row.input_ids[tokens], alone.ids)
        np.testing.assert_array_equal(row.labels[tokens], alone.labels)
        np.testing.assert_array_equal(row.position_ids[tokens], alone.pictures.positions)
        np.testing.assert_array_equal(row.modality[tokens], alone.pictures.modality)
    assert len(row.pictures) == 1 and row.num_segments == 3


def test_a_pair_that_is_too_long_is_dropped_or_has_smaller_pictures(directory: Path) -> None:
    record = {
        "messages": [{"role": "user", "content": "<image>?"}],
        "images": ["a.png"],
        "chosen": "good",
        "rejected": "bad",
    }
    [whole] = encode(directory, "messages (DPO)", record).documents
    limit = len(whole.ids) - 1
    dropped = encode(directory, "messages (DPO)", record, limit)
    assert f"the pair has {limit + 1} tokens, 9 of them of pictures" in dropped.dropped
    assert dropped.needed == limit + 1  # `check` reports it as too long
    [smaller] = encode(directory, "messages (DPO)", record, limit, truncation="shrink").documents
    assert len(smaller.ids) <= limit
