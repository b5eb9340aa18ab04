"""`erniekit check` of data with pictures: every record, from headers alone; with decode=true every pixel."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import write_picture
from support.tiny_directories import write_lines
from support.vision_directories import vision_model_directory

from erniekit.cli import check
from erniekit.cli.check import survey
from erniekit.cli.check.data import CheckOptions

DECODE = CheckOptions(decode=True)


def row(text, answer="Yes.", **media):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl")  # at most 56 x 56 pixels a picture


@pytest.fixture
def given(tmp_path, model):
    """Arguments of a run on records; keyword arguments replace keys."""
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", 56, 28 * (1 + number % 2), seed=number)

    def arguments(records, **keys):
        base = {
            "model_name_or_path": model,
            "continue_training": False,
            "stage": "VL-SFT",
            "train_dataset_path": write_lines(tmp_path / "train.jsonl", records),
            "train_dataset_type": "messages",
            "max_seq_len": 96,
            "output_dir": tmp_path / "out",
        }
        return [f"{name}={value}" for name, value in {**base, **keys}.items()]

    return arguments


def findings(args, level, options=check.data.DEFAULT_OPTIONS):
    report = check.inspect(args, "train", options)
    return [f.text for section in report.sections for f in section.findings if f.level == level]


GOOD = [row("<image>How many?", images=[f"{number}.png"]) for number in range(3)]


def test_data_that_are_fine(given, capsys):
    assert check.run(given([*GOOD, row("Hello.")])) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens of 4 samples" in said and "0 dropped, 0 without their last rounds" in said
    assert "3 pictures, 0 videos (0 frames): 8 tokens" in said
    assert "the most patches in one sample are 16" in said and "train.jsonl:2)" in said
    assert said.endswith("No errors and no warnings.")


def test_every_record_is_looked_at_and_each_fault_has_its_line(given, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    faults = {
        "0 <image> tags for 1 image. ": row("How many?", images=["0.png"]),
        "2 <image> tags for 1 image. ": row("<image><image>", images=["0.png"]),
        "1 <image> tag for 0 images. ": row("<image>How many?"),
        "missing.png. Hint: paths are relative to": row("<image>", images=["missing.png"]),
        "empty.png is empty. ": row("<image>", images=["empty.png"]),
        "words.png is not a picture of a known format. ": row("<image>", images=["words.png"]),
        "folder is a directory. ": row("<image>", images=["folder"]),
        "clip.mp4 is not a picture of a known format. Hint: a video stands": row("<image>", images=["clip.mp4"]),
        "the range is 0 to 1000 (relative)": row("<image>", '{"bbox_2d": [0, 0, 1200, 9]}', images=["0.png"]),
        "set allow_urls: true": row("<image>", images=["https://example.com/a.png"]),
        "a picture or video names no source": row("<image>", images=[{"url": ""}]),
        "a media source must be a path, a URL or bytes, not null": row("<image>", images=[None]),
    }
    (tmp_path / "clip.mp4").write_bytes(b"no video either")
    errors = findings(given([*GOOD, *faults.values(), *GOOD]), "error")
    for line, text in enumerate(faults, 4):
        [error] = [error for error in errors if f"train.jsonl:{line}: " in error]
        assert text in error and not error.endswith("?.")
    assert len(errors) == len(faults)


def test_faults_beyond_the_first_are_counted(given):
    bad = [row("<image>", images=[f"missing-{number}.png"]) for number in range(survey._SHOWN + 7)]
    errors = findings(given([*GOOD, *bad]), "error")
    assert len(errors) == survey._SHOWN + 1 and errors[-1] == "7 more records that cannot be used"


def test_bad_lines_that_are_skipped_are_warnings(given, capsys):
    args = given([*GOOD, row("<image>", images=["missing.png"])], on_bad_line="skip")
    assert check.run(args) == 0 and check.run([*args, "strict=true"]) == 3
    assert "missing.png" in findings(args, "warning")[0]
    capsys.readouterr()


def test_only_decoding_finds_a_truncated_picture(given, tmp_path):
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:-40])
    args = given([*GOOD, *GOOD])
    assert not findings(args, "error")
    errors = findings(args, "error", DECODE)
    assert [error.split(": ")[0][-1] for error in errors] == ["2", "5"]
    assert all("1.png cannot be decoded" in error for error in errors)
    assert "4 pictures and videos decoded" in findings(args, "ok", DECODE)


def test_what_decoding_decides_is_counted(given, tmp_path):
    write_picture(tmp_path / "clip" / "0.png", 56, 56)
    warnings = findings(given([*GOOD, row("<video>What?", videos=["clip"])]), "warning", DECODE)
    assert len(warnings) == 1 and "frames of a video come without times" in warnings[0]
    assert warnings[0].startswith("1 of the pictures and videos, first in ") and "train.jsonl:4" in warnings[0]


def test_the_advice_for_samples_that_are_too_long_works(given):
    records = [*GOOD, row("<image>" * 6 + "How many?", images=["1.png"] * 6)]
    [warning] = findings(given(records, max_seq_len=80), "warning")
    assert warning.startswith("1 sample of 4 is too long and dropped. The longest is ") and "train.jsonl:4:" in warning
    length = int(re.search(r"set max_seq_len to (\d+)", warning)[1])
    assert not findings(given(records, max_seq_len=length), "warning")
    assert findings(given(records, max_seq_len=length - 1), "warning")
    assert findings(given(records, max_seq_len=80, truncation="error"), "error")[0].startswith("1 sample of 4 is too")


def test_pictures_are_made_smaller_to_fit(given, tmp_path):
    write_picture(tmp_path / "large.png", 280, 280)
    records = [row("<image>What?", images=["large.png"])]
    keys = {"max_pixels": 280 * 280, "max_seq_len": 100}
    [warning] = findings(given(records, **keys), "warning")
    bound = int(re.search(r"max_pixels to (\d+)", warning)[1])
    assert not findings(given(records, **{**keys, "max_pixels": bound}), "warning")
    shrunk = given(records, **keys, truncation="shrink")
    assert not findings(shrunk, "warning")
    assert any("1 with pictures made smaller to fit" in text for text in findings(shrunk, "ok"))


def test_where_not_even_one_picture_fits(given):
    errors = findings(given(GOOD, max_seq_len=10), "error")
    assert errors == ["no sample can be used"]


def test_a_very_long_picture_is_named(given, tmp_path):
    write_picture(tmp_path / "line.png", 1000, 3)
    [warning] = findings(
        given([row("<image>", images=["line.png"])], max_pixels=28 * 28 * 500, max_seq_len=600), "warning"
    )
    assert "more than 200 times as long as wide" in warning and "train.jsonl:1: line.png" in warning


def test_workers_find_the_same(given, monkeypatch):
    args = given([*GOOD * 20, row("<image>", images=["missing.png"])])
    usage = shutil.disk_usage(".")  # other programs write to the disk meanwhile
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    alone = check.inspect(args, "train").to_text()
    monkeypatch.setattr(survey, "_FEW_RECORDS", 0)
    assert check.inspect(args, "train").to_text() == alone


def test_thousands_of_records_take_seconds(given):
    args, began = given(GOOD * 700), time.process_time()
    assert any("tokens of 2100 samples" in text for text in findings(args, "ok"))
    assert time.process_time() - began < 30


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_a_missing_decoder_is_one_error(given, tmp_path, monkeypatch, on_bad_line):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "erniekit.data.vision.video_file", raising=False)
    monkeypatch.delattr("erniekit.data.vision.video_file", raising=False)
    (tmp_path / "clip.mp4").write_bytes(b"...")
    videos = [row("<video>What?", videos=["clip.mp4"])] * 3
    errors = findings(given([*GOOD, *videos], on_bad_line=on_bad_line), "error")
    assert len(errors) == 1 and "needs PyAV. Hint: pip install 'erniekit[video]'" in errors[0]
    assert not findings(given(GOOD, on_bad_line=on_bad_line), "error")


def test_a_missing_decoder_does_not_matter_for_frames(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for number in range(2):
        write_picture(tmp_path / "clip" / f"{number}.png", 56, 56)
    videos = [row("<video>What?", videos=[source]) for source in ("clip", ["clip/0.png", "clip/1.png"])]
    assert not findings(given(videos), "error")


def test_text_beside_pictures_is_checked_too(given, tmp_path):
    turns = row("Hello.")["messages"]
    text = write_lines(tmp_path / "text.jsonl", [{"messages": turns}, {"messages": []}, {"messages": turns}])
    args = given(GOOD, max_steps=2, text_dataset_path=text, text_dataset_type="messages")
    errors = findings(args, "error")
    assert len(errors) == 1 and "text.jsonl:2: " in errors[0]
    ok = findings([*args, "on_bad_line=skip"], "ok")
    assert any("tokens of 3 samples" in line for line in ok) and any("tokens of all samples" in line for line in ok)
    assert "trained:     'Yes.</s>'" in findings([*args, "on_bad_line=skip"], "ok")


def test_text_beside_pairs_with_pictures_is_not_read_as_its_note_says(given, tmp_path):
    question = GOOD[0]["messages"][:1]
    pair = {"messages": question, "images": ["0.png"], "chosen": "Yes.", "rejected": "No."}
    text = write_lines(tmp_path / "text.jsonl", [{"messages": []}])
    args = given([pair], stage="VL-DPO", max_steps=2, text_dataset_path=text, text_dataset_type="messages")
    assert not findings(args, "error")
    notes = findings(args, "note")
    assert any(line.startswith("text_dataset_path, text_dataset_type: no effect: stage VL-DPO") for line in notes)


def test_a_model_of_text_is_refused(given):
    from support.source_tree import REPOSITORY

    errors = findings(given(GOOD, model_name_or_path=REPOSITORY / "examples/models/tiny-dense"), "error")
    assert any("is a model of text alone" in error for error in errors)


def test_a_mistake_in_a_json_list_has_its_line(given, tmp_path):
    text = (
        json.dumps(GOOD, indent=1)
        .replace('"assistant",', '"assistant"', 2)
        .replace('"assistant"\n', '"assistant",\n', 1)
    )
    (tmp_path / "list.jsonl").write_text(text)
    line = 1 + text[: text.index('"assistant"\n')].count("\n") + 1
    [error] = findings(given(GOOD, train_dataset_path=tmp_path / "list.jsonl"), "error")
    assert f"list.jsonl:{line}: the list cannot be read as JSON: Expecting ',' delimiter" in error


def test_an_evaluation_reads_pictures_too(given, tmp_path):
    args = given(GOOD, train_dataset_path="", eval_dataset_path=tmp_path / "train.jsonl", eval_dataset_type="messages")
    report = check.inspect(args, "eval")
    found = [finding for section in report.sections for finding in section.findings]
    assert not [finding for finding in found if finding.level == "error"]
    assert any(finding.text.startswith("3 pictures, 0 videos") for finding in found)


def clip(**options):
    part = {"type": "video", "video": [f"{number}.png" for number in (0, 2)], **options}
    content = [part, {"type": "text", "text": "?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}


# What is wrong with the second record -> (the record, keys, what the one error says).
BAD = {
    "more tags than pictures": (row("<image><image>?", images=["0.png"]), {}, r"2 <image> tags for 1 image\b.*once"),
    "pictures without tags": (row("?", images=["0.png"]), {}, r"0 <image> tags for 1 image\b.*missing_media_tags"),
    "a missing file": (row("<image>?", images=["none.png"]), {}, r"no file .*none\.png.*relative to the data file"),
    "an empty file": (row("<image>?", images=["empty.png"]), {}, r"empty\.png is empty.*copy the file again"),
    "a truncated header": (row("<image>?", images=["cut.png"]), {}, r"cut\.png cannot be decoded.*complete"),
    "no picture": (row("<image>?", images=["text.png"]), {}, r"text\.png is not a picture .*JPEG"),
    "1:300": (row("<image>?", images=["thin.png"]), {}, r"5600 x 28 pixels .*smallest max_pixels .* 155232"),
    "100 megapixels": (row("<image>?", images=["huge.png"]), {}, r"10000 x 10000 .*raise max_decoded_pixels"),
    "a video without frames": (row("<video>?", videos=["none"]), {}, r"directory .*none has no pictures"),
    "times that go back": (clip(time_stamps=[1, 0]), {}, r"time_stamps go back from 1 to 0 seconds at frame 1"),
    "too few times": (clip(time_stamps=[1]), {}, r"time_stamps must have a number of seconds for each of 2 frames"),
    "a time that is no number": (clip(time_stamps=["a", 1]), {}, r"time_stamps must have a number of seconds"),
    "a box outside": (
        row("<image>?", '{"bbox_2d": [0, 0, 10, 1001]}', images=["0.png"]),
        {},
        r"outside the picture: y is 1001, the range is 0 to 1000",
    ),
    "a box in pixels outside": (
        row("<image>?", '{"bbox_2d": [0, 0, 10, 57]}', images=["1.png"]),
        {"box_coordinates": "pixels"},
        r"outside the picture: y is 57, the range is 0 to 56",
    ),
    "a box with swapped corners": (
        row("<image>?", '{"bbox_2d": [900, 0, 10, 57]}', images=["0.png"]),
        {},
        r"corners swapped.*left, top, right, bottom",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_record_is_one_error_with_its_line(given, tmp_path, case):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:20])
    (tmp_path / "text.png").write_text("hello", "utf-8")
    (tmp_path / "none").mkdir()
    Image.new("RGB", (3000, 10)).save(tmp_path / "thin.png")
    if "huge.png" in str(BAD[case]):
        Image.new("L", (10000, 10000)).save(tmp_path / "huge.png")
    record, keys, message = BAD[case]
    [error] = findings(given([GOOD[0], record], **keys), "error")
    assert re.search(rf"train\.jsonl:2: .*{message}", " ".join(error.split())), error


@pytest.mark.parametrize("kind", ["one pixel", "CMYK", "animated", "wrong suffix"])
def test_unusual_pictures_are_read(given, tmp_path, kind):
    """One pixel becomes a token's area; of an animation the first frame is used, which decoding says."""
    name = "a.gif" if kind == "animated" else "a.jpg"
    picture = Image.new("CMYK" if kind == "CMYK" else "RGB", (1, 1) if kind == "one pixel" else (40, 40))
    more = [Image.new("RGB", (40, 40), (number, 0, 0)) for number in range(3)] if kind == "animated" else []
    options = {"save_all": True, "append_images": more} if more else {}
    picture.save(tmp_path / name, "PNG" if kind == "wrong suffix" else None, **options)
    args = given([GOOD[0], row("<image>?", images=[name])])
    assert findings(args, "error", DECODE) == []
    assert any("only the first one" in text for text in findings(args, "warning", DECODE)) == (kind == "animated")


def test_pictures_on_a_model_of_text_are_one_error(given):
    text = Path(__file__).parents[4] / "examples" / "models" / "tiny-dense"
    [error] = findings(given(GOOD, model_name_or_path=text), "error")
    assert re.search(r"stage: VL-SFT: .*tiny-dense is a model of text alone.*Name a vision-language model", error)


def test_pictures_under_a_stage_of_text_are_one_error(given):
    [error] = findings(given(GOOD, stage="SFT"), "error")
    assert re.search(r"train\.jsonl:1: field 'images' .*set that stage", " ".join(error.split()))


def test_a_bound_that_contradicts_the_models_own_is_one_error(given):
    [error] = findings(given(GOOD, min_pixels=1 << 30), "error")
    assert "min_pixels: 1073741824 contradicts the model's own max_pixels: 3136" in error


def test_where_not_one_picture_fits_the_length_is_named(given):
    args = given(GOOD[:1], max_seq_len=16)
    [warning] = [text for text in findings(args, "warning") if "too long" in text]
    length = int(re.search(r"set max_seq_len to (\d+)", warning)[1])
    assert findings(given(GOOD[:1], max_seq_len=length), "error") == []
    assert findings(given(GOOD[:1], max_seq_len=length - 1), "error") != []
