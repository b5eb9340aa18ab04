"""What ranks send to one another: bytes, counted by kind of operation."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes this rank sent, by kind of operation."""

    sent: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: float) -> None:
        self.sent[kind] += int(num_bytes)

    def take(self) -> dict[str, int]:
        """What was counted since the last call; counting starts at 0 again."""
        taken = dict(self.sent)
        self.sent.clear()
        return taken
