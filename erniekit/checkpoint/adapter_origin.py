"""Whether an adapter is used on the model that it was trained on. Its files hold no config.json, so what the YAML
changed in that of the base (overrides of build.py) is known from the config.yaml beside it alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erniekit.config.schema import Config
from erniekit.config.stored import stored_settings
from erniekit.utils import log

_KEYS = ("rope_theta", "rope_scaling", "moe_group_experts")


def say_if_base_differs(adapter_dir: Path, cfg: Config) -> None:
    """Log a warning if config.yaml beside an adapter names other changes of the base's config.json than `cfg`."""
    settings = stored_settings(adapter_dir)
    if settings is None:
        return
    trained, used = _changes_of(settings), _changes_of(vars(cfg))
    changed = [key for key in trained if trained[key] != used[key]]
    if changed:
        log.warning(
            f"{adapter_dir / 'config.yaml'}: this adapter was trained with "
            f"{', '.join(f'{key}: {trained[key]}' for key in changed)}: its base "
            "is another model now. Set the same to use it as in training"
        )


def _changes_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What these values of keys change in the config.json of a base; max_seq_len decides by how much is scaled."""
    changes = {key: str(values.get(key) or "not given") for key in _KEYS}
    if values.get("rope_scaling"):
        changes["rope_scaling"] += f", max_seq_len: {values.get('max_seq_len')}"
    return changes
