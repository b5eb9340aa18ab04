"""Tiny vision-language model directories and data with pictures, for tests of commands."""

import copy
import json
from pathlib import Path
from typing import Any

from support.pictures import write_picture
from support.tiny_directories import VOCAB_SIZE, write_lines
from support.tiny_vision import CONFIG

# The picture tokens of the demo's tokenizer.
_TOKENS = {
    "image_token_id": 10,
    "image_start_token_id": 11,
    "image_end_token_id": 12,
    "video_token_id": 13,
    "video_start_token_id": 14,
    "video_end_token_id": 15,
}


def vision_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny model for the demo's tokenizer and real patches; `changes` are keys of text_config."""
    config = copy.deepcopy(CONFIG) | _TOKENS | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config["text_config"] |= {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2} | changes
    config["vision_config"] |= {"patch_size": 14}
    return config


def vision_model_directory(path: Path, weights: bool = False, max_pixels: int = 56 * 56, **changes: Any) -> Path:
    """A directory with config.json, tokenizer and processor files and, if `weights`, a random model's weights."""
    from support.pictures import vision_directory

    vision_directory(path, min_pixels=28 * 28, max_pixels=max_pixels)
    config = vision_config(**changes)
    if weights:
        from erniekit.checkpoint.model_io import save_model
        from erniekit.models.config import ModelConfig
        from erniekit.models.decoder import CausalLM
        from erniekit.models.init import init_weights

        model = CausalLM(ModelConfig.from_dict(config))
        init_weights(model, 3)
        save_model(model, path)
    else:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def picture_records(directory: Path, count: int = 12) -> list[dict[str, Any]]:
    """Conversations about pictures of several sizes; some have two pictures, or none, or a video."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        names = [f"pictures/{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(names):
            write_picture(directory / name, 28 * (1 + number % 2), 28 * (1 + i), seed=number)
        content = "<image>" * len(names) + f"{number}?"
        record: dict[str, Any] = {"images": names}
        if number % 6 == 3:
            for frame in range(4):
                write_picture(directory / "pictures" / f"clip-{number}" / f"{frame}.png", 28, 28, seed=number + frame)
            content, record["videos"] = "<video>" + content, [f"pictures/clip-{number}"]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"={number}"}]
        records.append({"messages": messages, **record})
    return records


def erniekit_records(directory: Path, count: int = 6) -> list[dict[str, Any]]:
    """The same in ERNIEKit's format: image_info and text_info."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        name = f"pictures/e{number}.png"
        write_picture(directory / name, 28 * (1 + number % 2), 28, seed=100 + number)
        texts = [{"text": f"{number}?", "tag": "mask"}, {"text": f"={number}", "tag": "no_mask"}]
        records.append({"image_info": [{"image_url": name, "matched_text_index": 0}], "text_info": texts})
    return records


def vision_workspace(directory: Path, weights: bool = False, **changes: Any) -> Path:
    """A model `vl`, train.jsonl (messages), erniekit.jsonl and run.yaml with stage: VL-SFT; the YAML's path."""
    vision_model_directory(directory / "vl", weights, **changes)
    write_lines(directory / "train.jsonl", picture_records(directory))
    write_lines(directory / "erniekit.jsonl", erniekit_records(directory))
    yaml = directory / "run.yaml"
    yaml.write_text(
        f"""
model_name_or_path: {directory}/vl
continue_training: {str(weights).lower()}
stage: VL-SFT
train_dataset_type: messages
train_dataset_path: {directory}/train.jsonl
eval_dataset_type: erniekit
eval_dataset_path: {directory}/erniekit.jsonl
output_dir: {directory}/out
max_seq_len: 96
packing: true
batch_size: 1
gradient_accumulation_steps: 2
max_steps: 6
num_train_epochs: 100
learning_rate: 1.0e-2
save_steps: 2
compute_type: fp32
disable_tqdm: true
""",
        encoding="utf-8",
    )
    return yaml
