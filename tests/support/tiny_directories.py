"""Model directories for tests of commands: a tiny random model with the demo's tokenizer."""

import json
import shutil
from pathlib import Path

from erniekit.checkpoint.model_io import save_model
from support.tiny_models import tiny_model

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


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    """Records as a JSON-lines file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
