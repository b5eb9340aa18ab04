"""Finds checkpoints whose files a disk, a copy or a quota has cut short, so that a run can go back before them."""

import zipfile
from pathlib import Path

from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, holds_model
from erniekit.checkpoint.safetensors_header import INDEX_FILE, read_header, read_index
from erniekit.training.state import OPTIMIZER_DIR, STATE_FILE
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object


def damage_of(checkpoint: Path, with_optimizer: bool = True) -> str | None:
    """What is cut short in a training checkpoint, as far as names, headers and sizes tell; None: nothing. The values of
    tensors are not read. `with_optimizer`: whether the run wants the optimizer's state; that it is gone altogether is
    no damage, since users remove it from runs that have ended.
    """
    if not (checkpoint / STATE_FILE).is_file() or not holds_model(checkpoint):
        return f"it lacks {STATE_FILE} or weights: a delete or a copy was interrupted"
    try:
        for file in _small_files(checkpoint):
            read_json_object(file, CheckpointError)
        for file in sorted(checkpoint.glob("*.npz")):
            if not zipfile.is_zipfile(file):
                return f"{file}: an archive without its end"
        for file in _weight_files(checkpoint):
            if with_optimizer or file.parent != checkpoint / OPTIMIZER_DIR:
                read_header(file)
    except CheckpointError as error:
        return str(error)
    return None


def _small_files(checkpoint: Path) -> list[Path]:
    """The JSON files without which a run cannot continue: states, also of rollouts, and what describes an adapter."""
    described = checkpoint / ADAPTER_CONFIG_FILE
    return [*sorted(checkpoint.glob("*_state.json")), *([described] if described.is_file() else [])]


def _weight_files(checkpoint: Path) -> list[Path]:
    """The weight files of a checkpoint and of its directories, also those that are named in an index and not there."""
    named = [index.parent / name for index in checkpoint.rglob(INDEX_FILE) for name in read_index(index).values()]
    return sorted({*checkpoint.rglob("*.safetensors"), *named})
