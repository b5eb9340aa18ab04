"""Keys of stage RM: what a reward model is trained with."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key


@dataclass(frozen=True, kw_only=True)
class RewardModelArgs:
    """The loss of a reward model (docs/rewards.md)."""

    group: ClassVar[str] = "reward model"

    reward_margin: float = key(
        0.0, "The score of the chosen answer has to be higher by this times the difference of the `sort` scores.", ge=0
    )
    center_rewards_coefficient: float = key(
        0.0, "Weight of a term that keeps the sum of a pair's scores near 0 (TRL's name; arXiv 2312.09244).", ge=0
    )
