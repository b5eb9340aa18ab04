"""What a configuration asks for that this version cannot do, and what it says that does nothing here."""

from erniekit.config import methods, pointless
from erniekit.config.compat import RUN, Detail, Later, NoEffect
from erniekit.config.compat_keys import RULES
from erniekit.config.schema import Config
from erniekit.utils.errors import ConfigError

_COMPUTE = {
    "fp16": "fp16 training with loss scaling",
    "fp8": "FP8",
}


def unsupported(cfg: Config, command: str = "train") -> list[str]:
    """What cfg asks of `command` that this version cannot do yet: one line each with key, value and feature."""
    found: list[str] = []
    if cfg.method.later and command in ("train", "eval"):
        built = f"{', '.join(methods.BUILT[:-1])} and {methods.BUILT[-1]}"
        found.append(f"stage: {cfg.method.name} ({cfg.method.later}); it has {built}")
    if cfg.compute_type in _COMPUTE and command in RUN:
        kind = _COMPUTE[cfg.compute_type]
        found.append(
            f"compute_type: {cfg.compute_type} ({kind}); it has bf16 and fp32, and for a frozen base wint8, "
            "wint4, wint4/8 and nf4"
        )
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, Later) and command in rule.commands and rule.asks(value):
            found.append(f"{name}: {value} ({rule.feature})")
    return found


def require_supported(cfg: Config, command: str = "train") -> None:
    """Raises ConfigError that lists what `unsupported` finds."""
    found = unsupported(cfg, command)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ConfigError(f"{cfg.source or 'the configuration'} asks for what this version cannot do yet:{lines}")


def notes(cfg: Config, command: str) -> list[str]:
    """One line for each key given that does nothing in this run, with the reason."""
    found: list[str] = []
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, NoEffect):
            found.append(f"{name}: no effect: {rule.why}")
        elif isinstance(rule, Detail):
            found.append(f"{name}: no effect: read only with {rule.of}, which this version does not have")
        elif isinstance(rule, Later) and rule.asks(value) and command not in rule.commands:
            found.append(f"{name}: no effect: `{command}` does not need it")
        elif isinstance(rule, Later) and rule.otherwise and not rule.asks(value):
            found.append(f"{name}: no effect: {rule.otherwise}")
    return found + pointless.notes(cfg, command)
