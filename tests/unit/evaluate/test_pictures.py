"""`evaluate` asks questions about pictures and videos, and keeps their paths beside the answers."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import blocks, encoded, write_picture
from support.tiny_directories import model_directory, write_lines
from support.vision_directories import vision_model_directory

import erniekit
from erniekit.config import Config, load
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.evaluate import evaluate
from erniekit.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=84 * 84)


def frames(directory: Path) -> Path:
    for number in range(4):
        write_picture(directory / f"{number}.png", 56, 56, seed=number)
    return directory


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """About a picture, two pictures, a video, and nothing; the first picture is used twice."""
    write_picture(tmp_path / "media" / "a.png", 84, 56, seed=1)
    write_picture(tmp_path / "media" / "b.png", 60, 90, seed=2)
    frames(tmp_path / "media" / "clip")
    return [
        record("<image>Where is the cup?", '[{"bbox_2d": [1, 2, 30, 40]}]', images=["media/a.png"]),
        record("<image><image>Which?", "B", images=["media/a.png", "media/b.png"]),
        record("What is 1 plus 1?", "2"),
        record("<video>What happens?", "it falls", videos=["media/clip"]),
    ]


def record(question: str, answer: str, **media: list[str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}


def settings(model_dir: Path, tmp_path: Path, records: list[dict[str, Any]], **keys: object) -> Config:
    values: dict[str, object] = {
        "model_name_or_path": str(model_dir),
        "stage": "VL-SFT",
        "eval_dataset_path": str(write_lines(tmp_path / "eval.jsonl", records)),
        "eval_dataset_type": "messages",
        "eval_output": str(tmp_path / "results"),
        "predict_with_generate": True,
        "max_new_tokens": 5,
        "compute_type": "fp32",
    }
    return load(None, values | keys, command="eval")


def predictions(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "results" / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_answers_are_those_of_the_model_to_the_processor_s_arrays(
    model_dir: Path, tmp_path: Path, records: list[dict[str, Any]]
):
    results = evaluate(settings(model_dir, tmp_path, records))
    found = predictions(tmp_path)
    model, processor = erniekit.load_model(str(model_dir)), erniekit.load_processor(model_dir)
    media = tmp_path / "media"
    contents: list[Any] = [
        [{"type": "image", "image": media / "a.png"}, "Where is the cup?"],
        [{"type": "image", "image": media / "a.png"}, {"type": "image", "image": media / "b.png"}, "Which?"],
        "What is 1 plus 1?",
        [{"type": "video", "video": media / "clip"}, "What happens?"],
    ]
    for content, line in zip(contents, found, strict=True):
        arrays = processor([{"role": "user", "content": content}], add_generation_prompt=True)
        ends = [*processor.template.stop_ids, *model.end_ids]
        ids = model.generate(**arrays, max_new_tokens=5, eos_token_id=ends).numpy()[0, arrays["input_ids"].shape[1] :]
        answer = load_tokenizer(model_dir).decode([i for i in ids.tolist() if i not in ends])
        assert line["prediction"] == answer
    assert len({line["prediction"] for line in found}) > 1
    assert results["num_answers"] == 4
    assert {name: results[name] for name in ("num_box_answers", "num_option_answers", "num_text_answers")} == {
        "num_box_answers": 1,
        "num_option_answers": 1,
        "num_text_answers": 1,
    }
    assert results["loss"] > 0


def test_predictions_keep_the_paths_and_the_way_an_answer_was_measured(
    model_dir: Path, tmp_path: Path, records: list[dict[str, Any]]
):
    evaluate(settings(model_dir, tmp_path, records))
    found = predictions(tmp_path)
    assert [line.get("images") for line in found] == [["media/a.png"], ["media/a.png", "media/b.png"], None, None]
    assert [line.get("videos") for line in found] == [None, None, None, ["media/clip"]]
    assert [line.get("reference_kind") for line in found] == ["boxes", "option", None, "text"]
    assert "Picture 2:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>Which?" in found[1]["prompt"]


def test_the_picture_decides_the_answer(model_dir: Path, tmp_path: Path):
    """Two rows that differ in nothing but their picture, which share a batch."""
    for number in range(6):
        write_picture(tmp_path / f"{number}.png", 84, 84, seed=number)
    rows = [record("<image>?", "x", images=[f"{number}.png"]) for number in range(6)]
    evaluate(settings(model_dir, tmp_path, rows))
    assert len({line["prediction"] for line in predictions(tmp_path)}) > 1


def test_a_picture_that_is_not_there_is_found_before_a_weight_is_read(
    model_dir: Path, tmp_path: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("erniekit.generation.load.PreparedChatModel.load", lambda *_: pytest.fail("it was read"))
    broken = [*records, record("<image>?", "x", images=["media/none.png"])]
    with pytest.raises(DataError, match=r"eval\.jsonl:5: there is no file .*none\.png"):
        evaluate(settings(model_dir, tmp_path, broken))


@pytest.mark.parametrize("damage", ["header", "body"])
def test_a_damaged_picture_stops_the_evaluation_or_counts_as_wrong(
    model_dir: Path, tmp_path: Path, records: list[dict[str, Any]], damage: str
):
    whole = write_picture(tmp_path / "whole.png", 84, 84).read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: 8 if damage == "header" else len(whole) // 2])
    rows = [*records, record("<image>?", "x", images=["bad.png"])]
    with pytest.raises(DataError, match=r"eval\.jsonl:5: .*bad\.png"):
        evaluate(settings(model_dir, tmp_path, rows))
    evaluate(settings(model_dir, tmp_path, records))
    expected = [line["prediction"] for line in predictions(tmp_path)]
    evaluate(settings(model_dir, tmp_path, rows, on_bad_line="skip"))
    found = predictions(tmp_path)
    assert [line["prediction"] for line in found[:4]] == expected
    if damage == "body":
        assert (found[4]["prediction"], found[4]["stop"]) == ("", "picture not readable")
    else:
        assert len(found) == 4


def test_pictures_in_a_record_are_named_shortly(model_dir: Path, tmp_path: Path):
    source = "data:image/png;base64," + b64encode(encoded(blocks(56, 56))).decode()
    evaluate(settings(model_dir, tmp_path, [record("<image>?", "x", images=[source])]))
    (line,) = predictions(tmp_path)
    (name,) = line["images"]
    assert name.startswith("data:image/png") and len(name) < 100


def test_a_text_model_refuses_records_with_pictures(tmp_path: Path, records: list[dict[str, Any]]):
    text = model_directory(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"stage: VL-SFT: .* text alone"):
        evaluate(settings(text, tmp_path, records))
    with pytest.raises(DataError, match="VL-SFT"):
        evaluate(settings(text, tmp_path, records, stage="SFT"))


def test_answers_of_a_batch_do_not_depend_on_their_neighbours(
    model_dir: Path, tmp_path: Path, records: list[dict[str, Any]]
):
    evaluate(settings(model_dir, tmp_path, records))
    together = [line["prediction"] for line in predictions(tmp_path)]
    alone = []
    for row in records:
        evaluate(settings(model_dir, tmp_path, [row]))
        alone += [line["prediction"] for line in predictions(tmp_path)]
    assert together == alone
    assert np.unique(together).size > 1
