"""`erniekit check preview=N`: records as the model gets them, and a sheet of their pictures."""

import json

import numpy as np
import pytest
from PIL import Image
from support.pictures import write_picture
from support.source_tree import REPOSITORY
from support.tiny_directories import write_lines
from support.vision_directories import vision_model_directory

from erniekit.cli import check, tokenize
from erniekit.utils.errors import ConfigError


@pytest.fixture
def given(tmp_path):
    vision_model_directory(tmp_path / "vl")
    write_picture(tmp_path / "cup.png", 120, 60)
    for number in range(3):
        write_picture(tmp_path / "clip" / f"{number}.png", 56, 56, seed=number)
    box = json.dumps([{"bbox_2d": [0, 0, 500, 1000], "label": "cup"}])
    turns = [{"role": "user", "content": "<image>Where?<video>"}, {"role": "assistant", "content": "There."}]
    records = [
        {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]},
        {"messages": turns, "images": ["cup.png"], "videos": ["clip"]},
        {
            "messages": [turns[0] | {"content": "<image>Where?"}, {"role": "assistant", "content": box}],
            "image": "cup.png",
        },
    ]
    values = {
        "model_name_or_path": tmp_path / "vl",
        "continue_training": False,
        "stage": "VL-SFT",
        "train_dataset_path": write_lines(tmp_path / "train.jsonl", records),
        "train_dataset_type": "messages",
        "max_seq_len": 200,
        "output_dir": tmp_path / "out",
    }
    return [f"{name}={value}" for name, value in values.items()]


def test_records_as_the_model_gets_them(given, tmp_path, capsys):
    assert check.run([*given, "preview=2", f"sheet={tmp_path}/sheet.png"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    first, second = said.split("the first train record as the model gets it")[1].split("train record 2 as the model")
    assert "train.jsonl:1: " in first and "trained: 'Hi.</s>'" in first  # not what the conversation goes on with
    assert "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|> x 2<|IMAGE_END|>Where?" in second
    assert "<|VIDEO_START|><|VIDEO_PLACEHOLDER|> x 8<|VIDEO_END|>" in second
    assert "1: cup.png: 120 x 60 pixels -> 56 x 28, 2 tokens" in second
    assert "2: clip: 3 frames and the last one again, 56 x 56 pixels -> 56 x 56, 8 tokens" in second
    assert "14 of pictures and videos" in second and "train record 3" not in said


def test_the_sheet_shows_the_resized_pictures_and_boxes(given, tmp_path, capsys):
    check.run([*given, "preview=3", f"sheet={tmp_path}/sheet.png"])
    assert "sheet.png shows" in capsys.readouterr().out
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    red = (abs(pixels - (220, 30, 30)).sum(axis=2) < 10).nonzero()
    assert len(red[0]) > 100  # the box
    assert pixels.shape[1] == 3 * (360 + 12) + 12  # three tiles beside one another: two pictures and a video


def test_no_sheet_is_written_unasked_or_without_pictures(given, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check.run(given)
    check.run([*given, "preview=1"])
    assert not (tmp_path / "preview.png").exists()
    check.run([*given, "preview=2"])
    assert (tmp_path / "preview.png").exists()
    capsys.readouterr()


def test_records_of_text_have_a_preview_too(tmp_path, capsys):
    data = write_lines(tmp_path / "t.jsonl", [{"src": [f"q {i}"], "tgt": [f"a {i}"]} for i in range(4)])
    args = [f"model_name_or_path={REPOSITORY}/examples/models/tiny-dense", "continue_training=false"]
    check.run([*args, f"train_dataset_path={data}", f"output_dir={tmp_path}/out", "max_seq_len=64", "preview=3"])
    said = " ".join(capsys.readouterr().out.split())
    assert "train record 3 as the model gets it" in said and "trained: 'a 2</s>'" in said
    assert "train record 4" not in said and "t.jsonl:3: 1" in said


def test_equal_turns_are_all_shown(given, tmp_path, capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 3
    data = write_lines(tmp_path / "turns.jsonl", [{"messages": turns, "label": [1, 1, 1]}])
    check.run([*given, f"train_dataset_path={data}"])
    assert capsys.readouterr().out.count("trained:     'a</s>'") == 3


def test_a_sheet_that_cannot_be_written_is_refused_at_once(given, tmp_path):
    with pytest.raises(ConfigError, match=r"sheet=.*in a directory that exists"):
        check.run([*given, "preview=1", f"sheet={tmp_path}/nowhere/sheet.png"])


def test_a_preview_of_a_wrong_number(given):
    for wrong in ("some", "-1", "100000"):
        with pytest.raises(ConfigError, match=f"preview={wrong}: expected a number of records from 0 to 1000"):
            check.run([*given, f"preview={wrong}"])


def test_prompts_of_reinforcement_learning_are_shown_too(tmp_path, capsys):
    lines = [{"src": [f"{number}+1="], "answer": f"{number + 1}"} for number in range(4)]
    values = {
        "model_name_or_path": REPOSITORY / "examples/models/tiny-dense",
        "continue_training": False,
        "stage": "RL",
        "reward_funcs": "exact",
        "train_dataset_path": write_lines(tmp_path / "prompts.jsonl", lines),
        "max_completion_length": 8,
        "output_dir": tmp_path / "out",
    }
    words = [f"{name}={value}" for name, value in values.items()]
    assert check.run([*words, "preview=2", "first=3", f"records={tmp_path}/out.json"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    third, fourth = said.split("train prompt 3 as the model gets it")[1].split("train prompt 4 as the model gets it")
    assert "prompts.jsonl:3: " in third and "2+1=" in third and "answer: '3'" in third and "answer: '4'" in fourth
    written = json.loads((tmp_path / "out.json").read_text())
    assert [record["where"].rpartition(":")[2] for record in written] == ["3", "4"]
    tokens = written[0]["documents"][0]["tokens"]
    assert "2+1=" in "".join(text for text, _, _ in tokens) and not any(trained for _, trained, _ in tokens)
    assert check.run(words) == 0
    assert "the first train prompt as the model gets it" in " ".join(capsys.readouterr().out.split())


def test_token_files_have_no_records_to_show(tmp_path, capsys):
    model = REPOSITORY / "examples/models/tiny-dense"
    text = write_lines(tmp_path / "text.jsonl", [{"text": f"{number}+1={number + 1}"} for number in range(40)])
    tokenize.run([str(text), f"tokenizer={model}", f"output={tmp_path}/part", "workers=0"])
    words = [f"model_name_or_path={model}", "continue_training=false", "dataset_type=pretrain", "max_seq_len=16"]
    words += [f"input_dir={tmp_path}/part", "split=1,0,0", "max_steps=1", f"output_dir={tmp_path}/out"]
    assert check.run([*words, "preview=2"]) == 0
    assert "token files hold no records" in " ".join(capsys.readouterr().out.split())
    assert check.run(words) == 0
    assert "token files hold no records" not in " ".join(capsys.readouterr().out.split())


def test_pictures_of_prompts_are_decoded_and_shown(tmp_path, capsys):
    vision_model_directory(tmp_path / "vl")
    for name in ("whole", "broken"):
        write_picture(tmp_path / f"{name}.png", 120, 60)
    content = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[: len(content) // 2])
    asks = {"messages": [{"role": "user", "content": "<image>Where?"}], "answer": "there"}
    values = {
        "model_name_or_path": tmp_path / "vl",
        "continue_training": False,
        "stage": "VL-RL",
        "reward_funcs": "exact",
        "train_dataset_path": write_lines(
            tmp_path / "prompts.jsonl", [asks | {"images": [f"{name}.png"]} for name in ("whole", "broken")]
        ),
        "train_dataset_type": "messages",
        "max_seq_len": 200,
        "max_completion_length": 8,
        "output_dir": tmp_path / "out",
    }
    words = [f"{name}={value}" for name, value in values.items()]
    assert check.run([*words, "preview=1", f"sheet={tmp_path}/sheet.png"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1: whole.png: 120 x 60 pixels -> 56 x 28, 2 tokens" in said and (tmp_path / "sheet.png").is_file()
    assert check.run([*words, "decode=true"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "prompts.jsonl:2: " in said and "1 picture or video decoded" in said
