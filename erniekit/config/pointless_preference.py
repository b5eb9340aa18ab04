"""Keys of preference optimisation that another key makes pointless (see config/pointless.py)."""

from collections.abc import Callable

from erniekit.config.compat import DATA
from erniekit.config.pointless_rule import Facts, Rule
from erniekit.config.schema import Config
from erniekit.config.schema_preference import ALIASES, AVERAGED, REFERENCE_FREE, wants_reference


def _loss(cfg: Config) -> str:
    return ALIASES.get(cfg.loss_type, cfg.loss_type)


def _prefers(cfg: Config) -> bool:
    """Whether the method has a preference loss."""
    return cfg.method.reads("loss_type")


def _has_no_reference(cfg: Config) -> bool:
    return _prefers(cfg) and not wants_reference(cfg)


def _has_other_loss(loss: str) -> Callable[[Config, Facts], bool]:
    """A condition: the method has a preference loss, and it is not `loss`."""
    return lambda c, f: _prefers(c) and c.loss_type != loss


PREFERENCE_RULES = [
    Rule(
        "reference_free",
        lambda c, f: _prefers(c) and _loss(c) in REFERENCE_FREE,
        "loss_type: {loss_type} has no reference by itself",
        DATA,
    ),
    Rule("simpo_gamma", _has_other_loss("simpo"), "read only with loss_type: simpo", DATA),
    Rule("dpop_lambda", _has_other_loss("dpop"), "read only with loss_type: dpop", DATA),
    Rule(
        "beta",
        lambda c, f: _prefers(c) and _loss(c) == "or",
        "loss_type: {loss_type} has none; only the logged rewards are scaled by it",
        DATA,
    ),
    Rule(
        "ref_logps_cache ref_model_update_steps",
        lambda c, f: _has_no_reference(c),
        "loss_type: {loss_type} with reference_free: {reference_free} has no reference",
        DATA,
    ),
    Rule(
        "ref_model_update_steps",
        lambda c, f: _prefers(c) and c.fine_tuning == "LoRA",
        "the reference is the model without its adapter",
        DATA,
    ),
    Rule(
        "normalize_logps",
        lambda c, f: _prefers(c) and _loss(c) in AVERAGED,
        "loss_type: {loss_type} averages over tokens by itself",
        DATA,
    ),
]
