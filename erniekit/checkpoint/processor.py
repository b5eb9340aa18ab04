"""The processor's files beside the weights of a vision-language model: how its pictures and videos are prepared."""

from dataclasses import replace
from pathlib import Path

from erniekit.checkpoint.model_dir import CHAT_TEMPLATE_FILE
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.vision.processor_files import (
    IMAGE_FILE,
    PROCESSOR_FILE,
    ProcessorSettings,
    read_settings,
    write_settings,
)
from erniekit.data.vision.smart_resize import Patching
from erniekit.data.vision.template import PLACEHOLDERS, TAGS
from erniekit.models.config import ModelConfig
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object

# The attributes of a tokenizer by which transformers' processor knows the tokens of pictures and videos
_ATTRIBUTES = {f"{kind}_token": token for kind, token in zip(TAGS, PLACEHOLDERS.values(), strict=True)}
_ATTRIBUTES |= {f"{kind}_start_token": start for kind, (start, _) in TAGS.items()}
_ATTRIBUTES |= {f"{kind}_end_token": end for kind, (_, end) in TAGS.items()}


def write_processor(directory: Path, config: ModelConfig, settings: ProcessorSettings) -> None:
    """Write the files that AutoProcessor, Baidu's code and `load_processor` read; nothing for a model of text. The size
    of patches is the model's, whatever the settings say.
    """
    vision = config.vision
    if vision is not None:
        write_settings(directory, replace(settings, patching=vision.patching))


def settings_of(*directories: Path | None, model: Patching | None = None) -> ProcessorSettings:
    """The settings of the first of some directories that has such files; the published ones if none has. `model`: see
    read_settings.
    """
    for directory in directories:
        if directory is not None and any((directory / name).exists() for name in (IMAGE_FILE, PROCESSOR_FILE)):
            return read_settings(directory, model)
    return ProcessorSettings() if model is None else ProcessorSettings(patching=model)


def complete_for_transformers(directory: Path, config: ModelConfig) -> None:
    """Name the tokens of pictures and videos in the tokenizer_config.json of a directory with the rest of a model's
    files, and write placeholders in its chat template as transformers' processor knows them. The tokens of a prompt
    stay the same. Nothing for a model of text, or a directory without a tokenizer.
    """
    file = directory / "tokenizer_config.json"
    if config.vision is None or not file.is_file():
        return
    lacking = sorted(set(_ATTRIBUTES.values()) - set(load_tokenizer(directory).special_tokens))
    if lacking:
        log.warning(f"{directory}: transformers' processor needs the token {lacking[0]}, which the tokenizer lacks")
        return
    settings = read_json_object(file, CheckpointError)
    named = settings.get("extra_special_tokens")
    named = named if isinstance(named, dict) else {}
    atomic.write_json(file, settings | {"extra_special_tokens": _ATTRIBUTES | named})
    template = directory / CHAT_TEMPLATE_FILE
    if template.is_file():
        text = template.read_text("utf-8")
        for typed, token in PLACEHOLDERS.items():
            text = text.replace(typed, token)
        template.write_text(text, encoding="utf-8", newline="")
