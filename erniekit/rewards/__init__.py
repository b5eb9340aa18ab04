"""Rewards of completions: the built-in functions, the user's own, and the Scorer that calls them (docs/rewards.md)."""

from erniekit.rewards.sample import Sample, ScoreTable
from erniekit.rewards.scorer import Scorer

__all__ = ["Sample", "ScoreTable", "Scorer"]
