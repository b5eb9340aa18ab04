"""Runs in bf16 and fp16 on a CPU (`emulate_precision`), for the tests that hold them against fp32."""

import json
from pathlib import Path
from typing import Any

from support import equality

LORA = {"continue_training": True, "fine_tuning": "LoRA", "lora_rank": 4, "learning_rate": 1e-2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "untied with biases": ("untied", {}),
    "moe": ("moe", {}),
    "mtp": ("moe", {"num_nextn_predict_layers": 1}),
    "recompute": ("moe", {"recompute": True}),
    "lora": ("moe", LORA),
    "dora": ("dense", LORA | {"use_dora": True}),
    "dpo": ("dense", {"stage": "DPO", "train_dataset_path": "pairs.jsonl"}),
    "dpo lora": ("moe", LORA | {"stage": "DPO", "train_dataset_path": "pairs.jsonl"}),
    "vl": ("vl", {}),
}


def prepare(directory: Path) -> None:
    """The models and data of `equality`, and pairs of answers."""
    equality.prepare(directory)
    pairs = [
        {"src": [f"{a}加{b}等于？"], "response": [[str(a + b)], [f"是{a + b}"]], "sort": [1, 0]}
        for a in range(9)
        for b in range(9)
    ]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (directory / "pairs.jsonl").write_text(lines, encoding="utf-8")


def keys_of(directory: Path, model: str, compute_type: str, data_ranks: int = 1, **keys: Any) -> dict[str, Any]:
    """Overrides of a run in a compute_type."""
    if "train_dataset_path" in keys:
        keys["train_dataset_path"] = str(directory / keys["train_dataset_path"])
    emulated = {"emulate_precision": True} if compute_type != "fp32" else {}
    return equality.keys_for(str(directory), model, data_ranks, rows=2, compute_type=compute_type, **emulated, **keys)


def dtypes_of(file: Path) -> dict[str, str]:
    """The dtype of each tensor in a safetensors file, by name."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
