"""Defaults that differ from ERNIEKit's: a file that leaves the key out means something else here than there."""

from collections.abc import Callable

from erniekit.config.schema import Config, fields

# Key -> ERNIEKit's default, why ours differs, and whether the key matters to a configuration.
_OTHER: dict[str, tuple[str, str, Callable[[Config], bool]]] = {
    "fine_tuning": ("LoRA", "adapters are trained where they are asked for", lambda cfg: cfg.stage != "PT"),
    "logging_steps": ("500", "a short run would say nothing", lambda cfg: True),
    "normalize_logps": ("True", "as the papers have it", lambda cfg: cfg.stage == "DPO"),
}


def differing(cfg: Config, command: str) -> list[str]:
    """A line for each key that is not given, matters, and has another default in ERNIEKit."""
    if command != "train":
        return []
    ours = fields()
    return [
        f"{name}: not given, so {ours[name].default}; ERNIEKit's default is {theirs} ({why})"
        for name, (theirs, why, matters) in _OTHER.items()
        if name not in cfg.given and matters(cfg)
    ]
