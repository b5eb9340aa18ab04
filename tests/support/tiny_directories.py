"""Model directories for tests of commands: a tiny random model with the demo's tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from erniekit.checkpoint.model_io import save_model
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from support.pictures import vision_directory
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"
VOCAB_SIZE = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]


def model_directory(path: Path, weights: bool = True, **changes: object) -> Path:
    """A directory with config.json, tokenizer files and, if `weights`, the weights of a random model."""
    model = tiny_model(vocab_size=VOCAB_SIZE, **changes)
    path.mkdir(parents=True, exist_ok=True)
    if weights:
        save_model(model, path)
    else:
        (path / "config.json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    for file in DEMO_MODEL.glob("*tokenizer*"):
        shutil.copy(file, path)
    return path


def vision_model_directory(path: Path, **text_changes: object) -> Path:
    """A vision-language model's directory: tokenizer, processor files, and random weights for patches of 14 x 14
    pixels.
    """
    vision_directory(path)
    tokenizer = load_tokenizer(path)
    names = {
        f"{kind.lower()}_{which.lower()}_token_id": f"<|{kind}_{which}|>"
        for kind in ("IMAGE", "VIDEO")
        for which in ("START", "END")
    }
    names |= {f"{kind.lower()}_token_id": f"<|{kind}_PLACEHOLDER|>" for kind in ("IMAGE", "VIDEO")}
    ids: dict[str, Any] = {key: tokenizer.token_id(token) for key, token in names.items()}
    text = CONFIG["text_config"] | {"vocab_size": 576} | text_changes
    vision = CONFIG["vision_config"] | {"patch_size": 14}
    model = CausalLM(ModelConfig.from_dict(CONFIG | ids | {"text_config": text, "vision_config": vision}))
    init_weights(model, 3)
    save_model(model, path)
    return path


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    """Records as a JSON-lines file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
