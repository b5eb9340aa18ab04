"""Resolves a name or path to a local directory. An existing local path is preferred; other texts are names on a hub."""

import re
from collections.abc import Callable
from pathlib import Path

from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, DataError, UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
_MODEL_FILES = ["*.safetensors", *_SMALL_FILES]
_TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "*.jinja",
    "chat_template*",
]
_DATA_FILES = ["*.json", "*.jsonl", "*.txt", "*.csv", "*.parquet"]


def resolve_model(
    name_or_path: str, download_hub: str | None = None, key: str = "model_name_or_path", weights: bool = True
) -> Path:
    """The local directory of a model. For a Hub name, tokenizer, configuration and, unless `weights` is False, weights
    are downloaded. Raises CheckpointError that names the YAML `key`.
    """
    patterns = _MODEL_FILES if weights else _SMALL_FILES
    return _resolve(name_or_path, download_hub, key, "model", patterns, CheckpointError)


def resolve_tokenizer(name_or_path: str, download_hub: str | None = None) -> Path:
    """The local directory of a tokenizer. For a Hub name, only the tokenizer's files are downloaded."""
    key = "tokenizer_name_or_path"
    return _resolve(name_or_path, download_hub, key, "model", _TOKENIZER_FILES, CheckpointError)


def resolve_dataset(name_or_path: str, download_hub: str | None = None, key: str = "train_dataset_path") -> Path:
    """The local file or directory of a data set. For a Hub name, its data files are downloaded. Raises DataError that
    names the YAML `key`.
    """
    return _resolve(name_or_path, download_hub, key, "dataset", _DATA_FILES, DataError)


def find_model(name_or_path: str) -> Path | None:
    """The directory of resolve_model if it is on this machine; None for a Hub name. Downloads nothing."""
    return _find(name_or_path, "model_name_or_path", "model", _MODEL_FILES, CheckpointError)


def find_tokenizer(name_or_path: str) -> Path | None:
    """The directory of resolve_tokenizer if it is on this machine; None for a Hub name. Downloads nothing."""
    return _find(name_or_path, "tokenizer_name_or_path", "model", _TOKENIZER_FILES, CheckpointError)


def find_dataset(name_or_path: str, key: str = "train_dataset_path") -> Path | None:
    """The path of resolve_dataset if it is on this machine; None for a Hub name. Downloads nothing."""
    return _find(name_or_path, key, "dataset", _DATA_FILES, DataError)


def local_path(name: str) -> Path | None:
    """The existing file or directory that a text names (~ is the home directory), or None."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # the name is too long, has an unknown user, or contains a NUL
        return None


def _find(name: str, key: str, kind: str, patterns: list[str], error_type: type[UserError]) -> Path | None:
    """The local path; None if the text may be a Hub name."""
    path = local_path(name)
    if path is not None:
        snapshots = sorted(path.glob("snapshots/*/")) if path.name.startswith(f"{kind}s--") else []
        if snapshots:
            raise error_type(
                f"{key}: {path} is the Hugging Face Hub's cache of all versions. Hint: name one of them: "
                f"{', '.join(map(str, snapshots))}"
            )
        if kind == "model" and path.is_file():
            raise error_type(f"{key}: {path} is a file. Hint: name the directory that holds the model's files.")
        return path
    if not _NAME.fullmatch(name) or (
        kind == "dataset" and Path(name).suffix.lower() in {pattern[1:] for pattern in patterns}
    ):
        hint = "check the path; a Hub name has the form owner/name"
        if kind == "dataset" and set("*?[") & set(name):
            hint = "patterns are not expanded: name the files, separated by commas, or their directory"
        raise error_type(f"{key}: there is no file or directory {name!r} (looked in {Path.cwd()}). Hint: {hint}.")
    return None


def _resolve(name: str, hub: str | None, key: str, kind: str, patterns: list[str], error_type: type[UserError]) -> Path:
    path = _find(name, key, kind, patterns, error_type)
    if path is not None:
        return path
    title, download = _HUBS[hub or "huggingface"]
    log.info(f"{key}: {name} is not a local path; asking {title}")
    try:
        return Path(download(name, kind, patterns))
    except ImportError as error:
        raise error_type(
            f"{key}: {name!r} is not a local path, and download_hub: {hub} needs the extra `hubs` ({error}). "
            "Hint: pip install 'erniekit[hubs]', or leave out download_hub to use the Hugging Face Hub."
        ) from error
    # No connection, unknown name, no access, no disk space: the libraries and their HTTP clients have no common base
    # class.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise error_type(
            f"{key}: {name!r} is not a local path and could not be downloaded from {title} "
            f"({type(error).__name__}: {reason}). "
            "Hint: check the name and the connection, or give the path of a local copy."
        ) from error


def _from_hugging_face(name: str, kind: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, repo_type=kind, allow_patterns=patterns)


def _from_modelscope(name: str, kind: str, patterns: list[str]) -> str:
    from modelscope.hub.snapshot_download import snapshot_download

    return snapshot_download(name, repo_type=kind, allow_patterns=patterns)


def _from_aistudio(name: str, kind: str, patterns: list[str]) -> str:
    from aistudio_sdk.snapshot_download import snapshot_download

    return snapshot_download(repo_id=name, repo_type=kind, allow_patterns=patterns)


# The values of download_hub: the hub's name for messages, and the function that downloads from it. The last two need
# the extra `hubs`. They have been tested with stand-ins for their packages only, not with the real servers.
_HUBS: dict[str, tuple[str, Callable[[str, str, list[str]], str]]] = {
    "huggingface": ("the Hugging Face Hub", _from_hugging_face),
    "modelscope": ("ModelScope", _from_modelscope),
    "aistudio": ("AI Studio", _from_aistudio),
}
