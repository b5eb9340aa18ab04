"""Whether an adapter is used on the model that it was trained on. Its files hold no config.json, so what the YAML
changed in that of the base (overrides of build.py) is known from the config.yaml beside it alone.
"""

from pathlib import Path

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
    try:
        settings = yaml.safe_load(read_text(file, ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return  # the file is only a hint, and PEFT's adapters have none
    if not isinstance(settings, dict):
        return
    trained = {key: settings.get(key) or None for key in _KEYS}
    used = {key: vars(cfg)[key] or None for key in _KEYS}
    if trained["rope_scaling"] and trained["rope_scaling"] == used["rope_scaling"]:
        trained[_LENGTH], used[_LENGTH] = settings.get(_LENGTH), cfg.max_seq_len
    changed = [key for key in trained if trained[key] != used[key]]
    if not changed:
        return
    if "rope_scaling" in changed and trained["rope_scaling"]:
        changed.append(_LENGTH)
        trained[_LENGTH] = settings.get(_LENGTH)
    then = ", ".join(f"{key}: {'not given' if trained[key] is None else trained[key]}" for key in changed)
    log.warning(
        f"{file}: this adapter was trained with {then}: its base is another model now. Set the same to use it as in "
        "training"
    )
