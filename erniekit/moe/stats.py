"""What is known of a router over one step: load, entropy, losses, dropped tokens. Sums, so that microbatches and ranks
add up.
"""

from dataclasses import dataclass, field

import numpy as np
import paddle

from erniekit.moe.layer import Routed


@dataclass
class RouterStats:
    """Sums over the tokens of a step for one layer and modality: `usage` [E] choices, `entropy` of the probabilities
    (nats), `dropped` pairs, `num_tokens`, and each router loss by name.
    """

    usage: np.ndarray
    entropy: float = 0.0
    dropped: int = 0
    num_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)

    def add(self, other: "RouterStats") -> None:
        """Add another microbatch's sums."""
        self.usage = self.usage + other.usage
        self.entropy += other.entropy
        self.dropped += other.dropped
        self.num_tokens += other.num_tokens
        for name, value in other.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def to_vector(self) -> np.ndarray:
        """All sums as float64, for adding up over ranks."""
        rest = [self.entropy, self.dropped, self.num_tokens, *self.losses.values()]
        return np.concatenate([self.usage.astype(np.float64), np.array(rest, np.float64)])

    def from_vector(self, vector: np.ndarray) -> "RouterStats":
        """The stats whose sums are `vector`, with the names of this one's losses."""
        num_experts = len(self.usage)
        entropy, dropped, num_tokens, *losses = vector[num_experts:].tolist()
        usage = vector[:num_experts].astype(np.int64)
        return RouterStats(usage, entropy, int(dropped), int(num_tokens), dict(zip(self.losses, losses, strict=True)))

    def record(self, bias_E: np.ndarray) -> dict[str, float]:
        """Means a token, the busiest expert's load over the mean load, and the range of the correction bias."""
        tokens = max(self.num_tokens, 1)
        return {
            "load_max_over_mean": float(self.usage.max() / max(self.usage.mean(), 1e-9)),
            "idle_experts": int((self.usage == 0).sum()),
            "entropy": self.entropy / tokens,
            "dropped": self.dropped,
            "bias_min": float(bias_E.min()),
            "bias_max": float(bias_E.max()),
        } | {name: value / tokens for name, value in self.losses.items()}


@paddle.no_grad()
def measure(routed: Routed, losses: dict[str, paddle.Tensor]) -> RouterStats:
    """The sums of one microbatch; `losses` are sums over its tokens."""
    probs = routed.routing.probs
    entropy = -(probs * paddle.log(probs.clip(min=1e-30))).sum().item()
    values = {name: loss.item() for name, loss in losses.items()}
    return RouterStats(routed.usage, entropy, routed.dropped, probs.shape[0], values)
