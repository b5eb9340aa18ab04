"""The model of a server with the adapters that requests may name (`lora_modules`)."""

from pathlib import Path

from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, find_checkpoint, is_adapter
from erniekit.checkpoint.peft_attach import attach_several
from erniekit.checkpoint.peft_read import StoredAdapter, read_adapter
from erniekit.config import Config
from erniekit.data.chat.template import Template, say_if_trained_otherwise
from erniekit.generation.load import ChatModel, PreparedChatModel, find_model
from erniekit.generation.speculative import require_drafts
from erniekit.models.config import ModelConfig
from erniekit.serve.served_model import context_of, name_of
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError, UserError


def open_with_adapters(cfg: Config) -> ChatModel:
    """Find and load the model that `cfg` names, with the adapters of `lora_modules`. Raises CheckpointError or
    ConfigError that names the key, before weights are read.
    """
    found = find_model(cfg)
    context_of(cfg, found.prepared.config)
    if cfg.num_speculative_tokens:
        require_drafts(found.prepared.config)
    adapters = _read(cfg, found)
    chat_model = found.load()
    if adapters:
        attach_several(chat_model.model, adapters)
        log.info(f"adapters that requests may name: {', '.join(adapters)}")
    return chat_model


def adapter_directories(cfg: Config) -> dict[str, Path]:
    """The directory of each adapter by its name. Raises ConfigError."""
    directories: dict[str, Path] = {}
    for entry in cfg.lora_modules:
        name, equals, path = entry.partition("=")
        name, path = name.strip(), path.strip()
        if not (equals and name and path):
            raise ConfigError(f"lora_modules: expected name=directory, got {entry!r}.")
        if name in directories:
            raise ConfigError(f"lora_modules: {name}: there is another adapter of this name. Choose another.")
        directories[name] = Path(path).expanduser()
    return directories


def _read(cfg: Config, found: PreparedChatModel) -> dict[str, StoredAdapter]:
    directories = adapter_directories(cfg)
    prepared, adapters = found.prepared, {}
    key = "lora_modules" if directories else "lora_directory"
    if (directories or cfg.lora_directory) and prepared.adapter is not None:
        raise ConfigError(
            f"{key}: {found.path} is itself an adapter. Name its base as the model, and list it in lora_modules."
        )
    if (directories or cfg.lora_directory) and prepared.options.precision.qat is not None:
        raise ConfigError(f"{key}: a model with fake quantisation has one adapter at most. Leave one of them out.")
    if cfg.lora_directory is not None and not Path(cfg.lora_directory).is_dir():
        log.warning(f"lora_directory: there is no directory {cfg.lora_directory}; adapters can be loaded once there is")
    own_name = name_of(cfg, found.path)
    for name, given in directories.items():
        if name == own_name:
            raise ConfigError(
                f"lora_modules: {name} is the name of the model itself (served_model_name). Choose another."
            )
        base = None if prepared.options.random_start else prepared.path
        try:
            adapters[name] = read_named(name, given, prepared.config, base, found.template)
        except UserError as error:
            raise type(error)(f"lora_modules: {error}") from None
    return adapters


def read_named(name: str, given: Path, config: ModelConfig, base: Path | None, template: Template) -> StoredAdapter:
    """The adapter in a directory, or the newest of a training's, that requests may name. `base`: the directory of the
    model that it has to be of; None: not known. Raises CheckpointError or ConfigError that begins with the name.
    """
    try:
        path = given if is_adapter(given) else find_checkpoint(given)
        if not is_adapter(path):
            raise CheckpointError(f"{path} holds no adapter ({ADAPTER_CONFIG_FILE}).")
        stored = read_adapter(path, config, base)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    _require_plain(name, stored)
    say_if_trained_otherwise(path, template)
    return stored


def _require_plain(name: str, stored: StoredAdapter) -> None:
    """Raises ConfigError for an adapter that cannot share its base with others."""
    if stored.saved:
        raise ConfigError(
            f"{name}: {stored.path} trained {', '.join(stored.saved)} whole (modules_to_save), which "
            "other requests would get too. Serve it alone: checkpoint: its directory."
        )
    outside = [module for module in stored.slots if not module.startswith("model.layers.")]
    if outside:
        raise ConfigError(
            f"{name}: {stored.path} adapts {outside[0]}, which the pictures of several requests pass "
            "together. Serve it alone: checkpoint: its directory."
        )
