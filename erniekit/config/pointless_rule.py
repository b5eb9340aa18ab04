"""A rule about keys that have no effect (config/pointless.py has the rules)."""

from collections.abc import Callable
from dataclasses import dataclass

from erniekit.config.schema import Config

TRAIN, USE = ("train",), ("eval", "chat", "server")


@dataclass(frozen=True)
class Facts:
    """Facts about the model and the job, which become known after the configuration; None until then.

    num_experts: as in the model's config.json. aux_free: whether that file switches loss-free balancing on. data_ranks,
    ranks: their numbers in the job. sees_pictures: whether the model has a vision transformer.
    """

    num_experts: int | None = None
    aux_free: bool | None = None
    data_ranks: int | None = None
    ranks: int | None = None
    sees_pictures: bool | None = None


@dataclass(frozen=True)
class Rule:
    """States that `keys` (separated by spaces) have no effect in `commands` if the condition `when` is true. The reason
    `why` may contain values of other keys, as in "max_steps: {max_steps} decides".
    """

    keys: str
    when: Callable[[Config, Facts], bool]
    why: str
    commands: tuple[str, ...] = TRAIN


def always(cfg: Config, facts: Facts) -> bool:
    """The condition of a key that the commands of its rule never read."""
    return True
