"""The example data with pictures: as the tool makes them, and every row becomes a sample that can be trained on."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import vision_directory
from support.source_tree import REPOSITORY as ROOT
from support.vision_directories import vision_model_directory

from erniekit.cli import check
from erniekit.data.packed_batch import IGNORE
from erniekit.data.vision.encode import VisionEncoder, VisionSpec
from erniekit.data.vision.processor import load_processor

SPEC = importlib.util.spec_from_file_location("make_picture_example_data", ROOT / "tools/make_picture_example_data.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

DATA = ROOT / "examples" / "data"
TYPES = {"sft_vl-messages": "messages", "sft_vl-sharegpt": "sharegpt", "sft_vl-alpaca": "alpaca"}  # else erniekit
OTHER_METHODS = {"pt_vl-train.jsonl": "VL-PT", "dpo_vl-train.jsonl": "VL-DPO", "rl_vl-train.jsonl": "VL-RL"}
ROWS = [
    pytest.param(name, number, line, id=f"{name}:{number}")
    for name in tool.FILES
    if name not in OTHER_METHODS
    for number, line in enumerate((DATA / name).read_text(encoding="utf-8").splitlines(), 1)
]


THINKING = ("sft_vl_think-train.jsonl", "sft_function_call_vl-train_demo1.jsonl")  # for the Thinking model alone


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    directory = vision_directory(tmp_path_factory.mktemp("model"))
    return {template: load_processor(directory, template) for template in ("ernie_vl", "ernie_vl_thinking")}


def encoded(processor, name: str, number: int, line: str):
    spec = VisionSpec(processor.settings)
    encoder = VisionEncoder(processor.template, spec, 8192)
    kind = TYPES.get(Path(name).stem, "erniekit")
    return encoder(f"{kind} (VL)", json.loads(line), f"{DATA / name}:{number}")


@pytest.mark.parametrize(("name", "number", "line"), ROWS)
def test_a_row_has_something_to_learn_and_its_pictures_can_be_decoded(processors, name, number, line):
    for template, processor in processors.items():
        if name in THINKING and template != "ernie_vl_thinking":
            continue
        result = encoded(processor, name, number, line)
        assert not result.dropped and result.documents
        for document in result.documents:
            assert (document.labels != IGNORE).any()
            for plan in document.pictures.sources if document.pictures else ():
                assert len(plan.patches()) == plan.geometry.patches


def test_calls_and_thoughts_are_learned_and_results_are_not(processors):
    processor = processors["ernie_vl_thinking"]
    name = "sft_function_call_vl-train_demo1.jsonl"
    zooms, search, addition = (DATA / name).read_text(encoding="utf-8").splitlines()

    def learned(line: str) -> str:
        documents = encoded(processor, name, 1, line).documents
        return "".join(
            processor.tokenizer.decode([i for i in document.labels.tolist() if i != IGNORE]) for document in documents
        )

    assert "image_zoom_in_tool" in learned(zooms) and "Picture 2" not in learned(zooms)
    assert "27" in learned(zooms) and "image_search" in learned(search) and '"a"' in learned(addition)
    assert sum(item.get("tool_response", False) for item in json.loads(zooms)["text_info"]) == 2
    assert len(json.loads(addition)["image_info"]) == 1  # its result is text alone


def test_files_are_what_the_tool_makes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path)])
    tool.main()
    for name in tool.FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    for name in tool.pictures():
        made, committed = (np.asarray(Image.open(root / "pictures" / name)) for root in (tmp_path, DATA))
        np.testing.assert_array_equal(made, committed, name)
    assert sum(path.stat().st_size for path in DATA.rglob("*.png")) < 60_000


@pytest.mark.parametrize(
    ("stage", "kind", "names"),
    [
        (
            "VL-SFT",
            "erniekit",
            [name for name in tool.FILES if Path(name).stem not in TYPES and name not in OTHER_METHODS],
        ),
        *(("VL-SFT", kind, [f"{name}.jsonl"]) for name, kind in TYPES.items()),
        ("VL-PT", "text", ["pt_vl-train.jsonl"]),
        ("VL-DPO", "messages", ["dpo_vl-train.jsonl"]),
        ("VL-RL", "messages", ["rl_vl-train.jsonl"]),
    ],
)
def test_the_check_command_finds_nothing_wrong(stage, kind, names, tmp_path):
    given = {
        "stage": stage,
        "model_name_or_path": str(vision_model_directory(tmp_path / "model")),
        "continue_training": "false",
        "train_dataset_type": ",".join([kind] * len(names)),
        "train_dataset_path": ",".join(str(DATA / name) for name in names),
        "output_dir": str(tmp_path / "out"),
        "chat_template": "ernie_vl_thinking",
    }
    if stage == "VL-RL":
        given["reward_funcs"] = "accuracy,box_iou"
    report = check.inspect([f"{key}={value}" for key, value in given.items()], "train")
    assert report.count("error") == 0, report
