"""How a run reads records with pictures: the processor files of its model, and the keys of its configuration."""

from pathlib import Path

from erniekit.config.schema import Config
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.processor_files import read_settings


def vision_spec(cfg: Config, model_dir: Path) -> VisionSpec | None:
    """How the run's method reads pictures; None for a method of text. CheckpointError for processor files that cannot
    be read.
    """
    return VisionSpec(read_settings(model_dir)) if cfg.method.vision else None
