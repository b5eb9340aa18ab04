"""A conversation with pictures as what a model continues: token ids, and where each picture or video stands in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.data.packed_batch import IGNORE
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.sequence import MediaTokens, expand


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt of S tokens with N pictures and videos, none of them decoded.

    `ids`: each placeholder is repeated as often as its picture has tokens. `modality` int8 [S]; `positions` int64
    [S, 3]; `first_tokens` int64 [N]: where the placeholders of each begin; `plans`: how each is decoded.
    """

    ids: list[int]
    modality: np.ndarray
    positions: np.ndarray
    first_tokens: np.ndarray
    plans: tuple[MediaPlan, ...]

    @property
    def ends(self) -> np.ndarray:
        """The token behind the placeholders of each picture [N]."""
        return self.first_tokens + np.array([plan.geometry.tokens for plan in self.plans], np.int64)


def picture_prompt(
    short_ids: Sequence[int], plans: Sequence[MediaPlan], tokens: MediaTokens, spec: VisionSpec
) -> PicturePrompt:
    """The prompt of a template's ids, which have one placeholder for each picture or video, in the order of `plans`."""
    counts = [plan.geometry.tokens for plan in plans]
    expanded = expand(short_ids, [IGNORE] * len(short_ids), counts, tokens)
    grid = np.array([plan.geometry.grid for plan in plans], np.int64).reshape(-1, 3)
    places = expanded.positions(grid, tokens, spec.position_rule, spec.settings.patching)
    return PicturePrompt(expanded.ids.tolist(), expanded.modality, places, expanded.first_tokens, tuple(plans))
