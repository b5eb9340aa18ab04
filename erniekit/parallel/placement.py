"""Which ranks share a parameter, its gradient and its optimizer state."""

from dataclasses import dataclass

from erniekit.parallel.process_group import Group


@dataclass(frozen=True)
class Placement:
    """How one local parameter is sharded and replicated.

    Attributes:
        gradient: ranks whose gradients of this parameter add up (all data ranks, or the expert-data ranks for experts).
        shard: ranks over which its optimizer state is divided (one rank: not divided); a subgroup of `gradient`.
        replica: ranks with the same shard (gradient = shard x replica).
        partial: tensor ranks over which its gradient is still a partial sum (one rank: none).
        share: the weight of this rank's gradient in that sum: 1 / size where each of these ranks has computed the
            whole gradient; their last bits may differ, and their copies of the parameter must not.
        ends: first and last stage for a shared embedding, else one rank.
        copies: the number of ranks in the world with these same values.
    """

    gradient: Group
    shard: Group
    replica: Group
    partial: Group
    ends: Group
    copies: int
    share: float = 1.0

    def __post_init__(self) -> None:
        assert self.gradient.size == self.shard.size * self.replica.size
