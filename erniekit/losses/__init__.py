"""Losses as pure functions: sums over tokens or values of each pair; the trainer divides once, globally."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erniekit.losses.policy import policy_loss
    from erniekit.losses.preference import preference_loss

__all__ = ["policy_loss", "preference_loss"]


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that importing the package does not import Paddle."""
    if name == "policy_loss":
        from erniekit.losses.policy import policy_loss

        return policy_loss
    if name == "preference_loss":
        from erniekit.losses.preference import preference_loss

        return preference_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
