"""The processor's files beside the weights of a vision-language model: how its pictures and videos are prepared."""

from dataclasses import replace
from pathlib import Path

from erniekit.data.vision.geometry import Patching
from erniekit.data.vision.processor_files import (
    IMAGE_FILE,
    PROCESSOR_FILE,
    ProcessorSettings,
    read_settings,
    write_settings,
)
from erniekit.models.config import ModelConfig


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
