"""Whether an adapter is used on the model that it was trained on. Its files hold no config.json, so what the YAML
changed in that of the base (overrides of build.py) is known from the config.yaml beside it alone.
"""

from pathlib import Path
from typing import Any

import yaml

from erniekit.config.schema import Config
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.user_files import read_text

_KEYS = ("rope_theta", "rope_scaling", "moe_group_experts")
_LENGTH = "max_seq_len"  # it decides by how much rope_scaling scales


def say_if_base_differs(adapter_dir: Path, cfg: Config) -> None:
    """Log a warning if config.yaml beside an adapter names other changes of the base's config.json than `cfg`."""
    file = adapter_dir / "config.yaml"
    settings = _settings_in(file)
    if settings is None:
        return
    trained = {key: settings.get(key) or None for key in _KEYS}
    used = {key: vars(cfg)[key] or None for key in _KEYS}
    if trained["rope_scaling"]:
        trained[_LENGTH], used[_LENGTH] = settings.get(_LENGTH), cfg.max_seq_len if used["rope_scaling"] else None
    changed = [key for key in trained if trained[key] != used[key]]
    if not changed:
        return
    if "rope_scaling" in changed and trained["rope_scaling"] and _LENGTH not in changed:
        changed.append(_LENGTH)
    then = ", ".join(f"{key}: {'not given' if trained[key] is None else trained[key]}" for key in changed)
    log.warning(
        f"{file}: this adapter was trained with {then}: its base is another model now. Set the same to use it as in "
        "training"
    )


def _settings_in(file: Path) -> dict[str, Any] | None:
    """The keys of a config.yaml; None where there is none that can be read: PEFT's adapters have none, and the file is
    only a hint.
    """
    try:
        settings = yaml.safe_load(read_text(file, ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None
