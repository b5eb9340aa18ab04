"""VL-SFT as a user starts it: what it writes, resuming, LoRA, and models that do not fit their data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_directories import write_lines
from support.vision_directories import picture_records, vision_workspace

import erniekit
from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.export.export import export
from erniekit.utils.errors import ConfigError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A workspace whose YAML has been run for 12 steps with an evaluation, and the result."""
    yaml = vision_workspace(tmp_path_factory.mktemp("vl"))
    return yaml, erniekit.train(str(yaml), max_steps=12, save_steps=5, do_eval=True)


def weights(path: Path) -> dict[str, bytes]:
    reader = Reader(path)
    return {name: reader.read(name).tobytes() for name in reader.keys()}  # noqa: SIM118 no mapping


def test_the_loss_falls_and_the_directory_is_a_vision_model(trained: tuple[Path, Any]) -> None:
    yaml, result = trained
    losses = [record["loss"] for record in result.history]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    out = yaml.parent / "out"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert 0 < summary["eval_loss"] < losses[0] and summary["num_tokens"] > 0
    for directory in (out, out / "checkpoint-10"):
        names = {path.name for path in directory.iterdir()}
        assert {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"} <= names
        assert "<|IMAGE_START|>" in (directory / "chat_template.jinja").read_text("utf-8")
    processor, model = erniekit.load_processor(out), erniekit.load_model(out)
    record = json.loads((yaml.parent / "train.jsonl").read_text("utf-8").splitlines()[1])
    picture = {"type": "image", "image": str(yaml.parent / record["images"][0])}
    inputs = processor([{"role": "user", "content": [picture, {"type": "text", "text": "1?"}]}])
    logits = model(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    assert logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("keys", [{}, {"dataloader_num_workers": 1, "ema_decay": 0.9, "moe_use_aux_free": True}])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path, keys: dict[str, Any]) -> None:
    yaml = vision_workspace(tmp_path)
    whole = erniekit.train(str(yaml), output_dir=str(tmp_path / "whole"), **keys)
    erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    (tmp_path / "parts" / "checkpoint-4").rename(tmp_path / "aside")
    rest = erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys)
    assert [record["step"] for record in rest.history] == [3, 4, 5, 6]
    for name in ("loss", "grad_norm", "num_tokens"):
        assert [record[name] for record in rest.history] == [record[name] for record in whole.history[2:]]
    for below in ("", "checkpoint-6/optimizer"):
        assert weights(tmp_path / "parts" / below) == weights(tmp_path / "whole" / below)


def test_pictures_on_a_model_of_text_are_refused_before_a_weight_is_read(trained: tuple[Path, Any]) -> None:
    yaml, _ = trained
    text = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"
    with pytest.raises(ConfigError, match=r"stage: VL-SFT: .*tiny-dense is a model of text alone"):
        erniekit.train(str(yaml), model_name_or_path=str(text), output_dir=str(yaml.parent / "refused"))
    assert not (yaml.parent / "refused" / "config.json").exists()


def test_text_on_a_vision_model_trains_the_text_part_alone(trained: tuple[Path, Any]) -> None:
    yaml, _ = trained
    directory = yaml.parent
    lines = [{"src": [f"{i}?"], "tgt": [f"={i}"]} for i in range(8)]
    (directory / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    erniekit.train(
        str(yaml),
        stage="SFT",
        model_name_or_path=str(directory / "out"),
        continue_training=True,
        train_dataset_type="erniekit",
        train_dataset_path=str(directory / "text.jsonl"),
        output_dir=str(directory / "text"),
        max_steps=2,
        moe_use_aux_free=True,
        dataloader_num_workers=1,
    )
    before, after = weights(directory / "out"), weights(directory / "text")
    changed = {name for name in before if before[name] != after[name]}
    untouched = {name for name in before if "vision" in name or "resampler" in name}
    assert untouched and not changed & untouched, sorted(changed & untouched)
    assert any("experts" in name for name in changed)
    assert "<|IMAGE_START|>" in (directory / "text" / "chat_template.jinja").read_text("utf-8")


@pytest.mark.parametrize("compute_type", ["fp32", "wint8"])
def test_lora_trains_adapters_of_both_groups_of_experts_and_exports(
    trained: tuple[Path, Any], tmp_path: Path, compute_type: str
) -> None:
    yaml, _ = trained
    keys = {
        "model_name_or_path": str(yaml.parent / "out"),
        "continue_training": True,
        "fine_tuning": "LoRA",
        "output_dir": str(tmp_path / "lora"),
        "lora_rank": 4,
        "max_steps": 4,
    }
    erniekit.train(str(yaml), compute_type=compute_type, **keys)
    names = weights_of_adapter(tmp_path / "lora")
    for module in (".mlp.text_moe.experts.", ".mlp.vision_moe.experts.", ".resampler_model.spatial_linear.fc1."):
        assert any(module in name for name in names)
    export(config.load(str(yaml), keys, "export"))
    before, after = weights(yaml.parent / "out"), weights(tmp_path / "lora" / "export")
    changed = {name for name in before if before[name] != after[name]}
    assert any("experts" in name for name in changed)
    assert not any("vision_model" in name or "resampler_model.mlp" in name or "norm" in name for name in changed)


VISION_TRANSFORMER = r"model\.vision_model\..*"


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "lora_target_modules": f"{VISION_TRANSFORMER},spatial_linear.0,o_proj"},
        {"rslora": True, "lora_plus_scale": 4, "lora_target_modules": VISION_TRANSFORMER, "modules_to_save": "norm"},
    ],
)
def test_lora_options_work_in_the_vision_transformer_and_the_resampler(
    trained: tuple[Path, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every adapter has learned something, and the exported model computes what base and adapter compute."""
    yaml, _ = trained
    base = yaml.parent / "out"
    keys = {"model_name_or_path": str(base), "continue_training": True, "fine_tuning": "LoRA", "lora_rank": 2}
    keys |= {"output_dir": str(tmp_path / "lora"), "max_steps": 3, **options}
    erniekit.train(str(yaml), **keys)
    export(config.load(str(yaml), keys, "export"))
    adapted = erniekit.load_model(base, adapter=tmp_path / "lora")
    factors = {name: p for name, p in adapted.named_parameters() if ".adapter.B" in name}
    assert any(".vision_model." in name for name in factors)
    assert all(float(p.abs().max()) > 0 for p in factors.values())
    picture = {"type": "image", "image": str(yaml.parent / "pictures" / "1-0.png")}
    content = [picture, {"type": "text", "text": "1?"}]
    inputs = erniekit.load_processor(base)([{"role": "user", "content": content}])
    inputs.pop("attention_mask")
    merged = erniekit.load_model(tmp_path / "lora" / "export")
    plain = erniekit.load_model(base)(**inputs).numpy()
    expected = adapted(**inputs).numpy()
    assert abs(expected - plain).max() > 1e-4
    assert merged(**inputs).numpy() == pytest.approx(expected, abs=1e-4)


def test_lora_with_frozen_parts(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """The adapters of a frozen part stay zero; where all are of frozen parts, the run is refused."""
    yaml, _ = trained
    keys = {"model_name_or_path": str(yaml.parent / "out"), "continue_training": True, "fine_tuning": "LoRA"}
    keys |= {"output_dir": str(tmp_path / "lora"), "max_steps": 2}
    erniekit.train(str(yaml), freeze_config="freeze_lm", **keys)
    model = erniekit.load_model(yaml.parent / "out", adapter=tmp_path / "lora")
    size = {name: float(p.abs().max()) for name, p in model.named_parameters() if ".adapter.B" in name}
    assert all(value == 0 for name, value in size.items() if "self_attn" in name or ".mlp.experts." in name)
    assert all(value > 0 for name, value in size.items() if "resampler" in name)
    keys["output_dir"] = str(tmp_path / "refused")
    with pytest.raises(ConfigError, match=r"every adapter belongs to a frozen part.*lora_target_modules"):
        erniekit.train(str(yaml), freeze_config="freeze_vision", lora_target_modules=VISION_TRANSFORMER, **keys)
    with pytest.raises(ConfigError, match=r"use_dora: .*experts.* routed experts cannot have DoRA"):
        erniekit.train(str(yaml), use_dora=True, **keys)


def weights_of_adapter(directory: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "np") as file:
        return list(file.keys())


def test_text_is_mixed_in_and_each_modality_has_its_loss_and_its_router(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    """Steps of pictures and of text by turns; resuming in the middle of the cycle changes nothing."""
    yaml, _ = trained
    lines = [{"src": [f"{i}?"], "tgt": [f"={i}"]} for i in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    keys = {
        "text_dataset_path": str(tmp_path / "text.jsonl"),
        "modality_ratio": "[2,1]",
        "modality_interleave": "batch",
        "moe_use_aux_free": True,
        "freeze_config": "freeze_lm",
        "packing": False,
        "max_steps": 7,
        "save_steps": 4,
    }
    whole = erniekit.train(str(yaml), output_dir=str(tmp_path / "whole"), **keys).history
    of_text = [set(record) & {"loss_text", "loss_image", "loss_video"} == {"loss_text"} for record in whole]
    assert of_text == [False, False, True, False, False, True, False]
    routers = [json.loads(line)["layers"] for line in (tmp_path / "whole" / "routers.jsonl").read_text().splitlines()]
    assert [sum(layers["1.vision"]["load"]) == 0 for layers in routers] == of_text
    erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-7")
    rest = erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys).history
    assert [record["loss"] for record in rest] == [record["loss"] for record in whole[4:]]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_pretraining_text_with_pictures(tmp_path: Path) -> None:
    yaml = vision_workspace(tmp_path)
    lines = [
        {"text": f"Picture <image> has the number {number}.", "images": record["images"][:1]}
        for number, record in enumerate(picture_records(tmp_path))
        if record["images"]
    ]
    write_lines(tmp_path / "text.jsonl", [*lines, {"text": "No picture is here."}])
    keys = {"stage": "PT-VL", "train_dataset_type": "text", "train_dataset_path": str(tmp_path / "text.jsonl")}
    history = erniekit.train(str(yaml), max_steps=8, **keys).history
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert any("loss_image" in record for record in history) and any("loss_text" in record for record in history)


def in_content_lists(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair as OpenAI's clients write it."""
    parts = [{"type": "image_url", "image_url": {"url": name}} for name in pair["images"]]
    parts.append({"type": "text", "text": pair["messages"][0]["content"].replace("<image>", "")})
    sides = {
        side: {"role": "assistant", "content": [{"type": "text", "text": pair[side]}]}
        for side in ("chosen", "rejected")
    }
    return {"messages": [{"role": "user", "content": parts}], **sides}


def test_pairs_of_answers_about_pictures(tmp_path: Path) -> None:
    """The chosen answers become likelier than the rejected ones; a resumed run repeats an uninterrupted one."""
    yaml = vision_workspace(tmp_path, weights=True)
    pairs = [
        {"messages": record["messages"][:1], "images": record["images"], "chosen": "yes", "rejected": "no"}
        for record in picture_records(tmp_path)
        if "videos" not in record
    ]
    pairs = [pair if number % 2 else in_content_lists(pair) for number, pair in enumerate(pairs)]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    keys = {
        "stage": "VL-DPO",
        "train_dataset_path": str(tmp_path / "pairs.jsonl"),
        "eval_dataset_type": "messages",
        "eval_dataset_path": str(tmp_path / "pairs.jsonl"),
        "do_eval": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_steps": 2,
    }
    result = erniekit.train(str(yaml), output_dir=str(tmp_path / "whole"), **keys)
    assert result.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and result.history[-1]["loss"] < 0.6
    assert result.summary["eval_reward_accuracy"] == 1.0
    erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    rest = erniekit.train(str(yaml), output_dir=str(tmp_path / "parts"), **keys).history
    assert [record["loss"] for record in rest] == [record["loss"] for record in result.history[2:]]


def test_text_pairs_and_a_file_of_the_reference(tmp_path: Path) -> None:
    """The pairs of the file are made with the model's own template, so the run finds them there."""
    yaml = vision_workspace(tmp_path, weights=True)
    pairs = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}], "chosen": "yes", "rejected": "no"} for n in range(6)
    ]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    keys = {"stage": "DPO", "train_dataset_path": str(tmp_path / "pairs.jsonl"), "max_steps": 1}
    history = erniekit.train(str(yaml), ref_logps_cache=str(tmp_path / "reference.npz"), **keys).history
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
