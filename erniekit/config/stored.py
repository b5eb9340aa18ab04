"""The config.yaml that a training writes beside its weights or its adapter."""

from pathlib import Path
from typing import Any

import yaml

from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.user_files import read_text


def stored_settings(directory: Path) -> dict[str, Any] | None:
    """The keys of config.yaml in a directory of a model or an adapter; None where there is none that can be read:
    directories of other tools have none, and the file is only a hint.
    """
    try:
        settings = yaml.safe_load(read_text(directory / "config.yaml", ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None
