"""Whether an adapter is used on the model that it was trained on. Its files hold no config.json, so what the YAML
changed in that of the base (overrides of build.py) is known from the config.yaml beside it alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from erniekit.config.schema import Config
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.user_files import read_text

_KEYS = ("rope_theta", "rope_scaling", "moe_group_experts")


def say_if_base_differs(adapter_dir: Path, cfg: Config) -> None:
    """Log a warning if config.yaml beside an adapter names other changes of the base's config.json than `cfg`."""
    file = adapter_dir / "config.yaml"
    settings = _settings_in(file)
    if settings is None:
        return
    trained, used = _changes_of(settings), _changes_of(vars(cfg))
    changed = [key for key in trained if trained[key] != used[key]]
    if changed:
        log.warning(
            f"{file}: this adapter was trained with {', '.join(f'{key}: {trained[key]}' for key in changed)}: its base "
            "is another model now. Set the same to use it as in training"
        )


def _changes_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What these values of keys change in the config.json of a base; max_seq_len decides by how much is scaled."""
    changes = {key: str(values.get(key) or "not given") for key in _KEYS}
    if values.get("rope_scaling"):
        changes["rope_scaling"] += f", max_seq_len: {values.get('max_seq_len')}"
    return changes


def _settings_in(file: Path) -> dict[str, Any] | None:
    """The keys of a config.yaml; None where there is none that can be read: PEFT's adapters have none, and the file is
    only a hint.
    """
    try:
        settings = yaml.safe_load(read_text(file, ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None
