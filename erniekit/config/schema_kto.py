"""Keys of the stage KTO."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key


@dataclass(frozen=True, kw_only=True)
class KtoArgs:
    """The loss of answers that are judged one by one (docs/preference.md)."""

    group: ClassVar[str] = "judged answers"

    kto_loss_type: str = key(
        "kto",
        "The loss; formulas and papers are in erniekit/losses/kto.py. apo_zero_unpaired does not estimate how far the "
        "policy is from its reference.",
        choices=("kto", "apo_zero_unpaired"),
    )
    desirable_weight: float = key(
        1.0, "Weight of a good answer; with its number and that of bad ones, their shares in the loss.", gt=0
    )
    undesirable_weight: float = key(1.0, "Weight of a bad answer.", gt=0)
