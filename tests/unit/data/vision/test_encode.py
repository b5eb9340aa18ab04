"""Records with pictures as documents: exact lengths before decoding, what happens to samples that are too long."""

from dataclasses import replace

import numpy as np
import pytest
from support.pictures import vision_directory, write_picture

from erniekit.data.packed_batch import IGNORE, Modality
from erniekit.data.vision.encode import VisionEncoder, VisionSpec
from erniekit.data.vision.processor import load_processor
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.smart_resize import PixelLimits
from erniekit.utils.errors import DataError

LIMITS = PixelLimits(56 * 56, 280 * 280)
SPEC = VisionSpec(replace(ProcessorSettings(), images=LIMITS, videos=LIMITS))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    directory = vision_directory(tmp_path_factory.mktemp("model") / "vl", LIMITS.min_pixels, LIMITS.max_pixels)
    return load_processor(directory, "vl")


@pytest.fixture
def encode(processor, tmp_path):
    """Encode a record of a file in tmp_path, which has pictures of 100 and of 4 tokens."""
    write_picture(tmp_path / "big.png", 280, 280)
    write_picture(tmp_path / "small.png", 56, 56, seed=1)

    def run(record, max_seq_len=1000, on_bad_line="error", template=None, kind="messages (VL)", **changes):
        encoder = VisionEncoder(template or processor.template, replace(SPEC, **changes), max_seq_len, on_bad_line)
        return encoder(kind, record, f"{tmp_path}/train.jsonl:3")

    return run


def rounds(*pictures, answer="fine"):
    """A conversation of one round for each picture."""
    messages = []
    for _ in pictures:
        messages += [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(pictures)}


def test_a_document_agrees_with_the_processor(encode, processor, tmp_path):
    """Training and serving have the same tokens, types, positions and patches."""
    record = rounds("big.png", "small.png")
    [document] = encode(record).documents
    parts = [
        [{"type": "image", "image": str(tmp_path / n)}, {"type": "text", "text": "What?"}] for n in record["images"]
    ]
    messages = []
    for content in parts:
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "fine"}]
    served = processor(messages)
    np.testing.assert_array_equal(document.ids, served["input_ids"][0])
    np.testing.assert_array_equal(document.pictures.modality, served["moe_mm_token_type_ids"][0])
    np.testing.assert_array_equal(document.pictures.positions, served["position_ids"][:, 0].T)
    np.testing.assert_array_equal(document.pictures.grid, served["image_grid_thw"])
    first = document.pictures.first_tokens
    placeholder = processor.tokenizer.token_id("<|IMAGE_PLACEHOLDER|>")
    assert (document.ids[first] == placeholder).all() and (document.ids[first - 1] != placeholder).all()
    assert (document.pictures.modality[first] == Modality.IMAGE).all()
    assert all(len(p.patches()) == p.geometry.patches for p in document.pictures.sources)


def test_media_carry_no_loss(encode):
    [document] = encode(rounds("small.png")).documents
    vision = np.flatnonzero(document.pictures.modality)
    assert (document.labels[vision] == IGNORE).all() and (document.labels[vision - 1] == IGNORE).all()
    assert (document.labels != IGNORE).any()


def test_only_headers_are_read(encode, tmp_path):
    """The length is exact although the pixels are missing."""
    whole = (tmp_path / "big.png").read_bytes()
    expected = len(encode(rounds("big.png")).documents[0].ids)
    (tmp_path / "big.png").write_bytes(whole[:200])
    assert len(encode(rounds("big.png")).documents[0].ids) == expected


def test_rounds_that_do_not_fit_are_left_out_with_their_pictures(encode):
    three = rounds("small.png", "big.png", "small.png")
    lengths = [len(encode(rounds(*three["images"][:n])).documents[0].ids) for n in (1, 2, 3)]
    assert lengths[1] - lengths[0] > 100
    for limit, count in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[1] - 1, 1), (lengths[0], 1)):
        encoded = encode(three, max_seq_len=limit)
        [document] = encoded.documents
        assert len(document.pictures.sources) == count and len(document.ids) == lengths[count - 1]
        assert encoded.cut == (count < 3)


def test_a_first_round_that_does_not_fit(encode):
    length = len(encode(rounds("big.png")).documents[0].ids)
    dropped = encode(rounds("big.png"), max_seq_len=length - 1)
    assert not dropped.documents
    assert f"has {length} tokens, 100 of them of 1 picture" in dropped.dropped
    with pytest.raises(
        DataError, match=rf"train.jsonl:3: .*set max_seq_len to {length}, or max_pixels to (\d+)"
    ) as caught:
        encode(rounds("big.png"), max_seq_len=length - 1, truncation="error")
    bound = int(str(caught.value).split("max_pixels to ")[1].split(",")[0])
    smaller = replace(SPEC.settings, images=PixelLimits(LIMITS.min_pixels, bound))
    assert len(encode(rounds("big.png"), settings=smaller).documents[0].ids) < length
    hopeless = encode(rounds("big.png"), max_seq_len=5)
    assert "max_pixels" not in hopeless.dropped and f"set max_seq_len to {length}" in hopeless.dropped
    least = int(hopeless.dropped.split(", or to ")[1].split(" ")[0])
    [document] = encode(rounds("big.png"), max_seq_len=least, truncation="shrink").documents
    assert len(document.ids) == least
    assert not encode(rounds("big.png"), max_seq_len=least - 1, truncation="shrink").documents


def test_a_picture_that_a_text_or_a_pair_has_no_room_for(encode):
    """The numbers in the message are those with which it fits."""
    text = {"text": "Two <image> and <image>.", "images": ["big.png", "small.png"]}
    pair = rounds("big.png") | {"chosen": "one", "rejected": "two"}
    pair["messages"] = pair["messages"][:1]
    for kind, record, limit in (("text (VL)", text, 60), ("messages (DPO) (VL)", pair, 100)):
        dropped = encode(record, max_seq_len=limit, kind=kind).dropped
        bound = int(dropped.split("or max_pixels to ")[1].split(",")[0])
        smaller = replace(SPEC.settings, images=PixelLimits(LIMITS.min_pixels, bound))
        assert encode(record, max_seq_len=limit, kind=kind, settings=smaller).documents, dropped
        larger = replace(SPEC.settings, images=PixelLimits(LIMITS.min_pixels, bound + 40 * 784))
        assert not encode(record, max_seq_len=limit, kind=kind, settings=larger).documents
        length = int(dropped.split("set max_seq_len to ")[1].split(",")[0])
        assert encode(record, max_seq_len=length, kind=kind).documents
        assert not encode(record, max_seq_len=length - 1, kind=kind).documents


def test_a_long_picture_is_shrunk_as_far_as_its_shape_allows(encode, tmp_path):
    """It has 32 tokens, and 28 at least, although the bound of pixels that others get is smaller."""
    write_picture(tmp_path / "long.png", 900, 30)
    alone = len(encode(rounds("long.png")).documents[0].ids)
    [document] = encode(rounds("long.png"), max_seq_len=alone - 4, truncation="shrink").documents
    assert len(document.ids) == alone - 4
    both = rounds("long.png") | {"images": ["long.png", "big.png"]}
    both["messages"][0]["content"] = "<image><image>What?"
    dropped = encode(both, max_seq_len=alone + 20).dropped
    assert "or truncation to shrink" in dropped and "max_pixels" not in dropped
    assert encode(both, max_seq_len=alone + 20, truncation="shrink").documents


def test_pictures_are_shrunk_to_fit(encode):
    length = len(encode(rounds("big.png", "small.png")).documents[0].ids)
    encoded = encode(rounds("big.png", "small.png"), max_seq_len=length - 20, truncation="shrink")
    [document] = encoded.documents
    assert encoded.shrunk and not encoded.cut
    big, small = document.pictures.sources
    assert 60 <= big.geometry.tokens <= 80 and small.geometry.tokens == 4  # no more than is needed
    assert len(document.ids) <= length - 20
    again = encode(rounds("big.png", "small.png"), max_seq_len=length - 20, truncation="shrink")
    assert (again.documents[0].ids == document.ids).all()


def test_videos_lose_pixels_and_then_frames(encode, tmp_path):
    for number in range(16):
        write_picture(tmp_path / "clip" / f"{number}.png", 280, 280, seed=number)
    record = {
        "messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "yes"}],
        "videos": ["clip"],
    }
    [document] = encode(record).documents
    assert document.pictures.grid.tolist() == [[16, 20, 20]]
    fewer = encode(record, max_seq_len=300, truncation="shrink").documents[0].pictures
    assert fewer.grid[0, 0] == 16 and fewer.grid.prod() // 8 <= 300
    [thinned] = encode(record, max_seq_len=45, truncation="shrink").documents[0].pictures.sources
    assert thinned.thinned and thinned.frames in (2, 4, 8) and len(thinned.patches()) == thinned.geometry.patches


def test_labels_choose_the_answers(encode):
    record = {**rounds("small.png", "small.png"), "label": [1, 0]}
    [document] = encode(record).documents
    trained = np.flatnonzero(document.labels != IGNORE)
    assert trained.max() < document.pictures.first_tokens[1]
    assert encode({**record, "label": [0, 0]}).dropped.startswith("no answer to learn")


def test_text_records_have_no_media(encode):
    [document] = encode(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ).documents
    assert document.pictures is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (rounds("none.png"), "there is no file"),
        ({**rounds("small.png"), "images": []}, "1 <image> tag for 0 images"),
        (rounds("small.png", answer="<think>\nx\n</think>\n\ny"), "no place for thoughts"),
        (b'{"messages": ', "not JSON"),
    ],
)
def test_bad_records(encode, record, message):
    with pytest.raises(DataError, match=rf"train.jsonl:3: .*{message}.*on_bad_line: skip"):
        encode(record)
    skipped = encode(record, on_bad_line="skip")
    assert not skipped.documents and message in skipped.dropped
