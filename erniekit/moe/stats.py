"""Statistics of a router over one step: load, entropy, losses, dropped pairs. They are sums, so that microbatches and
ranks add up.
"""

from dataclasses import dataclass, field

import numpy as np
import paddle

from erniekit.moe.layer import Routed

ENTROPY = "entropy"


@dataclass
class RouterStats:
    """Sums over the tokens of a step for one layer and modality: `usage` [E] choices, `entropy` of the probabilities
    (nats), `dropped` pairs, `num_tokens`, and each router loss by name. Of the `compared` tokens whose experts were
    recorded before, `changed` were sent to others, and for `disagreeing` ones the router by itself would choose others.
    """

    usage: np.ndarray
    entropy: float = 0.0
    dropped: int = 0
    num_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    changed: int = 0
    disagreeing: int = 0

    def __add__(self, other: "RouterStats") -> "RouterStats":
        """The sums of this and another microbatch."""
        names = dict.fromkeys([*self.losses, *other.losses])
        return RouterStats(
            self.usage + other.usage,
            self.entropy + other.entropy,
            self.dropped + other.dropped,
            self.num_tokens + other.num_tokens,
            {name: self.losses.get(name, 0.0) + other.losses.get(name, 0.0) for name in names},
            self.compared + other.compared,
            self.changed + other.changed,
            self.disagreeing + other.disagreeing,
        )

    def set_sum(self, name: str, value: float) -> None:
        """Set the entropy or a router loss, which `measure` returns as tensors on the device."""
        if name == ENTROPY:
            self.entropy = value
        else:
            self.losses[name] = value

    def to_vector(self) -> np.ndarray:
        """All sums as one float64 array, to be added up over ranks."""
        counts = (self.dropped, self.num_tokens, self.compared, self.changed, self.disagreeing)
        rest = [self.entropy, *counts, *self.losses.values()]
        return np.concatenate([self.usage.astype(np.float64), np.array(rest, np.float64)])

    def from_vector(self, vector: np.ndarray) -> "RouterStats":
        """The stats whose sums are `vector`, with the names of this one's losses."""
        num_experts = len(self.usage)
        entropy, *numbers = vector[num_experts:].tolist()
        dropped, num_tokens, compared, changed, disagreeing = map(int, numbers[:5])
        usage = vector[:num_experts].astype(np.int64)
        losses = dict(zip(self.losses, numbers[5:], strict=True))
        return RouterStats(usage, entropy, dropped, num_tokens, losses, compared, changed, disagreeing)

    def record(self, bias_E: np.ndarray) -> dict[str, float]:
        """Means over tokens, the largest load of an expert over the mean load, the range of the correction bias, and
        the shares of compared tokens.
        """
        tokens = max(self.num_tokens, 1)
        shares = {}
        if self.compared:
            shares["compared"] = float(self.compared)
            shares["changed_fraction"] = self.changed / self.compared
            shares["disagreeing_fraction"] = self.disagreeing / self.compared
        return (
            {
                "load_max_over_mean": float(self.usage.max() / max(self.usage.mean(), 1e-9)),
                "idle_experts": int((self.usage == 0).sum()),
                "entropy": self.entropy / tokens,
                "dropped": self.dropped,
                "bias_min": float(bias_E.min()),
                "bias_max": float(bias_E.max()),
            }
            | {name: value / tokens for name, value in self.losses.items()}
            | shares
        )


@paddle.no_grad()
def measure(routed: Routed, losses: dict[str, paddle.Tensor]) -> tuple[RouterStats, dict[str, paddle.Tensor]]:
    """The sums of one microbatch that were counted on the host, and by the names of `RouterStats.set_sum` those that
    stay on the device. `losses` are sums over the microbatch's tokens.
    """
    probs = routed.routing.probs
    entropy = -(probs * paddle.log(probs.clip(min=1e-30))).sum()
    stats = RouterStats(routed.usage, dropped=routed.dropped, num_tokens=probs.shape[0])
    if routed.changed is not None and routed.disagreeing is not None:
        stats.compared, stats.changed, stats.disagreeing = stats.num_tokens, routed.changed, routed.disagreeing
    return stats, {ENTROPY: entropy} | losses
