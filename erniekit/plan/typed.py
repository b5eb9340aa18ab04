"""Keys of a change as a user types them: `erniekit plan x.yaml KEY=VALUE ...` is the run that was proposed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from erniekit.config.schema import Config, fields

_DERIVED = ("emulate_precision",)  # follows from the device


def typed(keys: Mapping[str, Any]) -> str:
    """Every one of these keys with its value."""
    return " ".join(f"{name}={_value(value)}" for name, value in keys.items())


def read_keys(cfg: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keys that the method reads: the others are not worth typing."""
    return {name: value for name, value in keys.items() if cfg.method.reads(name)}


def differences(before: Config, after: Config) -> dict[str, Any]:
    """The keys that the method reads and that have another value in `after`, with that value."""
    old, new = vars(before), vars(after)
    return read_keys(after, {name: new[name] for name in fields() if new[name] != old[name] and name not in _DERIVED})


def changed(before: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that change something in `before`, with their values."""
    return differences(before, dataclasses.replace(before, **keys))


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
