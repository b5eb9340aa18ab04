"""Model directories as a whole: complete or not there, found again, and the files beside the weights."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    WEIGHT_FILE,
    replace_weights,
    sync_directory,
    write_error,
)
from erniekit.models.config import CONFIG_FILE, Format, ModelConfig
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# Everything a tokenizer may consist of, for either side.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    CHAT_TEMPLATE_FILE,
    "chat_template.json",
)
COMPANIONS = (*TOKENIZER_FILES, GENERATION_CONFIG_FILE, "preprocessor_config.json", "LICENSE", "README.md")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def has_weights(directory: Path) -> bool:
    """Whether a directory holds a complete model: config.json, and weights in one file or with an index."""
    weights = (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()
    return weights and (directory / CONFIG_FILE).is_file()


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter, to be used with the model it was trained on."""
    return all((Path(directory) / name).is_file() for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE))


def require_model(directory: Path) -> None:
    """Raises CheckpointError where model_name_or_path is an adapter."""
    if is_adapter(directory) and not has_weights(directory):
        raise CheckpointError(
            f"model_name_or_path: {directory} is an adapter: set lora_path to it, and model_name_or_path to the model "
            "it was trained on."
        )


def find_checkpoint(output_dir: str | Path) -> Path:
    """The model or the adapter of a run: the final one in `output_dir`, else the newest `checkpoint-N` that holds one.

    Raises CheckpointError where there is neither.
    """
    root = Path(output_dir)
    if has_weights(root) and is_adapter(root):
        raise CheckpointError(
            f"{root} holds both a model and an adapter, so it is not clear which is meant: move one of them elsewhere."
        )
    if has_weights(root) or is_adapter(root):
        return root
    numbered = []
    if root.is_dir():
        found = ((_CHECKPOINT.fullmatch(entry.name), entry) for entry in root.iterdir())
        numbered = sorted(((int(match.group(1)), entry) for match, entry in found if match), reverse=True)
    for _, directory in numbered:
        if has_weights(directory) or is_adapter(directory):
            return directory
        log.warning(f"{directory} holds no complete weights; looking for an earlier checkpoint")
    raise CheckpointError(
        f"No valid checkpoint found in: {root}. Expected {SINGLE_FILE} or {INDEX_FILE} with {CONFIG_FILE}, or an "
        f"adapter ({ADAPTER_FILE}), there or in a checkpoint-N below it; train first, or check output_dir."
    )


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A temporary directory to write into; on success its files move to `directory`, on an error they are removed.

    A new directory appears by one rename. In an existing one the temporary directory lies inside (on the same file
    system) and files are renamed one by one, the weights' index last; other files stay. What a crash left of an earlier
    attempt is removed first. OSErrors become CheckpointErrors.
    """
    target = Path(directory).resolve()
    staging = staging_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        move_staged(staging, target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staging_of(target: Path) -> Path:
    """The temporary directory of `target`, on the same file system."""
    return target / ".saving" if target.is_dir() else target.parent / f".{target.name}.saving"


def move_staged(staging: Path, target: Path) -> None:
    """Move what was written into the temporary directory `staging` to `target`, as `staged` says."""
    if not target.exists():
        os.rename(staging, target)
        sync_directory(target.parent)
        return
    files = {file.name: file for file in sorted(staging.iterdir())}
    weights = {name: file for name, file in files.items() if WEIGHT_FILE.fullmatch(name)}
    if weights:
        (target / INDEX_FILE).unlink(missing_ok=True)  # from here to the end the directory is not a sharded model
    for name, file in files.items():
        if name not in weights:
            os.replace(file, target / name)
    if weights:
        replace_weights(target, weights)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON, on disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_configs(directory: Path, config: ModelConfig, format: Format) -> None:
    """config.json in `format`, and generation_config.json where there is none yet."""
    write_json(directory / CONFIG_FILE, config.to_dict(format))
    generation = directory / GENERATION_CONFIG_FILE
    if not generation.exists():
        end = config.extra.get("eos_token_id", config.eos_token_id)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": end, "pad_token_id": config.pad_token_id}
        write_json(generation, ids)


def copy_companions(
    source: str | Path, target: str | Path, with_tokenizer: bool = True, names: Sequence[str] = COMPANIONS
) -> list[str]:
    """Copy a model directory's tokenizer, chat template, generation settings and notices; returns the names copied."""
    copied = []
    for name in names:
        file = Path(source) / name
        if file.is_file() and (with_tokenizer or name not in TOKENIZER_FILES):
            shutil.copyfile(file, Path(target) / name)
            copied.append(name)
    return copied


def not_copied(source: str | Path) -> list[str]:
    """Files of a model directory that are neither weights nor config nor companions, for a command to name."""
    known = {CONFIG_FILE, *COMPANIONS}
    names = (file.name for file in Path(source).iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(name for name in names if name not in known and not WEIGHT_FILE.fullmatch(name))
