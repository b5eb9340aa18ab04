"""Lists what a configuration requests that this version cannot do, and which of its keys have no effect."""

from erniekit.config import methods, pointless
from erniekit.config.compat import Detail, Later, NoEffect
from erniekit.config.compat_keys import RULES
from erniekit.config.schema import Config
from erniekit.utils.errors import ConfigError


def unsupported(cfg: Config, command: str = "train") -> list[str]:
    """One line (key, value, feature) for each thing that cfg requests of `command` and this version cannot do."""
    lines: list[str] = []
    if cfg.method.later and command in ("train", "eval"):
        built = methods.join_names(methods.BUILT, "and")
        lines.append(f"stage: {cfg.method.name} ({cfg.method.later}); it has {built}")
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, Later) and command in rule.commands and rule.is_unsupported(value):
            lines.append(f"{name}: {value} ({rule.feature})")
    return lines


def require_supported(cfg: Config, command: str = "train") -> None:
    """Raises ConfigError with the lines of `unsupported`, if there are any."""
    missing = unsupported(cfg, command)
    if missing:
        listing = "".join(f"\n  {line}" for line in missing)
        raise ConfigError(f"{cfg.source or 'the configuration'} requests what this version does not support:{listing}")


def notes(cfg: Config, command: str) -> list[str]:
    """One line for each given key that has no effect in this run, with the reason."""
    lines: list[str] = []
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, NoEffect):
            lines.append(f"{name}: no effect: {rule.why}")
        elif isinstance(rule, Detail):
            lines.append(f"{name}: no effect: read only with {rule.of}, which this version does not have")
        elif isinstance(rule, Later) and rule.is_unsupported(value) and command not in rule.commands:
            lines.append(f"{name}: no effect: `{command}` does not need it")
        elif isinstance(rule, Later) and rule.otherwise and not rule.is_unsupported(value):
            lines.append(f"{name}: no effect: {rule.otherwise}")
    return lines + pointless.notes(cfg, command)
