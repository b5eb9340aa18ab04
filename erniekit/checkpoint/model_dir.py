"""Model directories: writes them atomically, finds them again, and handles the files that accompany the weights."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erniekit.checkpoint.run_record import read_record
from erniekit.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE, WEIGHT_FILE, unusable_weights
from erniekit.checkpoint.safetensors_write import replace_weights, write_error
from erniekit.config.schema import Config
from erniekit.models.config import CONFIG_FILE, Format, ModelConfig
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError, ConfigError

GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# All files that a tokenizer may consist of, with transformers or with PaddleNLP.
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
# What a vision-language model's processor reads: its files, and the font that draws the time on frames.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "Roboto-Regular.ttf",
)
COMPANIONS = (*TOKENIZER_FILES, GENERATION_CONFIG_FILE, *PROCESSOR_FILES, "LICENSE", "README.md")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """The directory in which a run saves step `step`."""
    return output_dir / f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int | None:
    """The step N of a directory .../checkpoint-N; None for another name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Those that the run has abandoned are in directories of their own and are
    not among them.
    """
    if not output_dir.is_dir():
        return []
    steps = [(checkpoint_step(p), p) for p in output_dir.iterdir() if p.is_dir()]
    return [path for _, path in sorted((step, path) for step, path in steps if step is not None)]


def resuming_command(cfg: Config) -> str:
    """The command that resumes from the newest checkpoint of a training's output_dir, as text: the same command, but
    for keys that would remove that checkpoint or pass it over.
    """
    words = ["overwrite_output_dir=false"] if cfg.overwrite_output_dir else []
    words += ["resume_from_checkpoint=auto"] if cfg.resume_from_checkpoint != "auto" else []
    output_dir = Path(cfg.output_dir or "")
    may_hold_some = not output_dir.is_dir() or list_checkpoints(output_dir)  # a removed directory may come back
    return f"the same command with {' '.join(words)}" if words and may_hold_some else "the same command"


def where_it_resumes(output_dir: Path) -> str:
    """A clause for messages: where the training resumes when the same command is run again."""
    if list_checkpoints(output_dir):
        return "it resumes from the newest checkpoint"
    return "it begins where this run began, since there is no checkpoint yet"


def what_is_saved(cfg: Config) -> str:
    """Which checkpoint a training leaves behind, and how to resume from it, in a few words."""
    checkpoints = list_checkpoints(Path(cfg.output_dir or ""))
    if not checkpoints:
        return "no checkpoint has been saved"
    return f"the newest checkpoint is {checkpoints[-1]}; {resuming_command(cfg)} resumes from there"


def holds_model(directory: Path) -> bool:
    """Whether a directory holds a complete model or adapter."""
    return has_weights(directory) or is_adapter(directory)


def model_files(directory: Path) -> list[Path]:
    """The files of the model or adapter in a directory, complete or not. The first files are those without which the
    directory is not recognised as a model. Notices (LICENSE, README.md) are left out, since they may be the user's.
    """
    first = (CONFIG_FILE, ADAPTER_CONFIG_FILE)
    others = (ADAPTER_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *PROCESSOR_FILES)
    weights = sorted(entry.name for entry in directory.iterdir() if WEIGHT_FILE.fullmatch(entry.name))
    return [path for name in (*first, *weights, *others) if os.path.lexists(path := directory / name)]


def has_weights(directory: Path) -> bool:
    """Whether a directory holds a complete model: config.json, and weights in one file or with an index."""
    weights = (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()
    return weights and (directory / CONFIG_FILE).is_file()


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter, to be used with the model it was trained on."""
    return all((Path(directory) / name).is_file() for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE))


def require_model(directory: Path) -> None:
    """Raises CheckpointError if model_name_or_path is an adapter."""
    if is_adapter(directory) and not has_weights(directory):
        raise CheckpointError(
            f"model_name_or_path: {directory} is an adapter: set lora_path to it, and model_name_or_path to the model "
            "it was trained on."
        )


def require_adapter(lora_path: str) -> Path:
    """The directory that lora_path names. Raises CheckpointError if it is no adapter."""
    if not is_adapter(lora_path):
        older = ""
        if (Path(lora_path) / "adapter_model.bin").is_file():
            older = " adapter_model.bin is PEFT's older form: load it with PEFT and save it again."
        raise CheckpointError(
            f"lora_path: {lora_path} holds no adapter ({ADAPTER_CONFIG_FILE}, {ADAPTER_FILE}).{older}"
        )
    return Path(lora_path)


_NEEDS_WEIGHTS = (
    "Copy the model's weight files there, or set continue_training: false (with fine_tuning: Full) for a random start."
)


def require_weights(directory: Path, cure: str = _NEEDS_WEIGHTS) -> None:
    """Raises ConfigError if training is to start from weights and model_name_or_path has none; `cure`: what to do where
    there are none at all.
    """
    if not has_weights(directory):
        reason = unusable_weights(directory) or f"{directory} holds no weights. {cure}"
        raise ConfigError(f"model_name_or_path: {reason}")


def find_checkpoint(output_dir: str | Path) -> Path:
    """The model or adapter of a run: the newest `checkpoint-N` of an unfinished run, or the final model in `output_dir`
    of a finished run. If both exist and the checkpoint is used, this is logged.

    Raises CheckpointError if neither exists.
    """
    root = Path(output_dir)
    if has_weights(root) and is_adapter(root):
        raise CheckpointError(
            f"{root} holds both a model and an adapter, so it is not clear which to use: move one of them elsewhere."
        )
    newest = None
    for directory in reversed(list_checkpoints(root)):
        if holds_model(directory):
            newest = directory
            break
        log.warning(f"{directory} holds no complete weights; looking for an earlier checkpoint")
    if holds_model(root):
        reason = None if newest is None else _newer_than_final(root, newest)
        if newest is None or reason is None:
            return root
        log.info(f"using {newest.name} of {root}, not the final model there: {reason}")
    if newest is not None:
        return newest
    raise CheckpointError(
        f"No valid checkpoint found in: {root}. Expected {SINGLE_FILE} or {INDEX_FILE} with {CONFIG_FILE}, or an "
        f"adapter ({ADAPTER_FILE}), there or in a checkpoint-N below it; train first, or check output_dir."
    )


def _newer_than_final(root: Path, newest: Path) -> str | None:
    """The reason why a checkpoint is used although there is a final model; None if the final model is used."""
    record = read_record(root)
    if record is None:  # another tool's directory, whose order is unknown
        return None
    final, step = record.final_model, checkpoint_step(newest)
    assert step is not None, newest
    if final is None:
        return "the run is not finished, and did not write that model"
    if final.branch != record.branch:
        return "the run went back to an earlier checkpoint since it wrote that model, and is not finished"
    if final.step < step:
        return f"that model is of step {final.step}, and the run has continued since"
    return None


@contextmanager
def staged(directory: str | Path, outdated: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary directory to write into; on success its files are moved to `directory`, on an error they are removed.

    A new directory appears by one rename. In an existing one the temporary directory is inside (on the same file
    system) and files are renamed one by one, the weights' index last; other files stay, but for those that `outdated`
    names: files that belong to the model that is replaced. What an earlier attempt left when it was killed is removed
    first. OSErrors become CheckpointErrors.
    """
    target = Path(directory).resolve()
    staging = staging_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        move_staged(staging, target, outdated)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staging_of(target: Path) -> Path:
    """The temporary directory of `target`, on the same file system."""
    return atomic.shared_temporary(target / "model" if target.is_dir() else target)


def move_staged(staging: Path, target: Path, outdated: Sequence[str] = ()) -> None:
    """Move the files of the temporary directory `staging` to `target`, as described in `staged`."""
    atomic.sync_tree(staging)
    if not os.path.lexists(target):
        os.rename(staging, target)
        atomic.sync_directory(target.parent)
        return
    files = {file.name: file for file in sorted(staging.iterdir())}
    weights = {name: file for name, file in files.items() if WEIGHT_FILE.fullmatch(name)}
    # without an index the directory is not a model, so weights are never combined with another configuration
    if weights:
        for name in (INDEX_FILE, SINGLE_FILE):
            (target / name).unlink(missing_ok=True)
    for name in outdated:  # before the new files: after a kill they are not taken for files of the new model
        if name not in files:
            (target / name).unlink(missing_ok=True)
    for name, file in files.items():
        if name not in weights:
            if file.is_dir() and (target / name).exists():  # a rename does not replace a directory
                atomic.remove_tree(target / name)
            os.replace(file, target / name)
    if weights:
        replace_weights(target, weights)


def write_configs(directory: Path, config: ModelConfig, format: Format, more: Mapping[str, Any] | None = None) -> None:
    """Write config.json in `format`, with the keys of `more` beside those of the model, and generation_config.json if
    there is none yet.
    """
    atomic.write_json(directory / CONFIG_FILE, config.to_dict(format) | dict(more or {}))
    generation = directory / GENERATION_CONFIG_FILE
    if not generation.exists():
        end = config.extra.get("eos_token_id", config.eos_token_id)
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": end, "pad_token_id": config.pad_token_id}
        atomic.write_json(generation, ids)


def copy_companions(
    source: str | Path, target: str | Path, with_tokenizer: bool = True, names: Sequence[str] = COMPANIONS
) -> list[str]:
    """Copy a model directory's tokenizer, chat template, generation settings and notices; returns the names copied.

    A symbolic link is followed within the model's directory and within a cache of the Hub, which consists of links. One
    that leads elsewhere is not copied, with a warning: otherwise a link could bring a private file into what is
    published.
    """
    copied = []
    for name in names:
        file = Path(source) / name
        if not os.path.lexists(file) or (name in TOKENIZER_FILES and not with_tokenizer):
            continue
        reason = _why_not_copied(file)
        if reason is None:
            shutil.copyfile(file, Path(target) / name)
            copied.append(name)
        else:
            log.once(f"{file}: not copied: {reason}. Put a copy of the file there if it belongs to the model")
    return copied


def _why_not_copied(file: Path) -> str | None:
    """The reason why a file is not copied; None for a regular file of the model, also through a link."""
    if not file.is_file():
        return "a link to nothing" if file.is_symlink() and not file.exists() else "not a regular file"
    if leads_outside(file):
        return f"a link to {file.resolve()}, outside the model's directory"
    return None


def leads_outside(file: Path) -> bool:
    """Whether a file of a model directory is a link to a file that belongs neither to the directory nor to the Hub's
    cache of the same repository (snapshots/REVISION/file -> ../../blobs/HASH).
    """
    directory, real = file.parent.resolve(), file.resolve()
    root = directory.parent.parent if directory.parent.name == "snapshots" else directory
    return not real.is_relative_to(root)


def say_links(source: str | Path) -> None:
    """Log each weight or configuration file that is a link to a file outside the model's directory."""
    for file in sorted(Path(source).iterdir()):
        if (WEIGHT_FILE.fullmatch(file.name) or file.name == CONFIG_FILE) and leads_outside(file):
            log.info(f"{file} is a link to {file.resolve()}, outside the model's directory; it is read from there")


def not_copied(source: str | Path) -> list[str]:
    """The files of a model directory that are not copied: neither weights nor configuration nor companion files."""
    known = {CONFIG_FILE, *COMPANIONS}
    names = (file.name for file in Path(source).iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(name for name in names if name not in known and not WEIGHT_FILE.fullmatch(name))
