"""Token ids with one placeholder for each picture or video -> the sequence that the model gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.packed_batch import IGNORE, Modality
from erniekit.data.vision.positions import PositionRule, token_positions
from erniekit.data.vision.smart_resize import Patching
from erniekit.data.vision.template import PLACEHOLDERS, TAGS


@dataclass(frozen=True)
class MediaTokens:
    """The ids around and inside of pictures and videos. Where a tokenizer has no placeholder for videos, that of
    pictures stands there too, as in ERNIE's training code: only the modality tells them apart.
    """

    image_start: int
    image_end: int
    image: int
    video_start: int
    video_end: int
    video: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "MediaTokens":
        """The ids of a tokenizer that has them (see VisionTemplate)."""
        image, video = PLACEHOLDERS.values()
        image_id = tokenizer.token_id(image)
        found = tokenizer.find_id(video)
        ids = [tokenizer.token_id(tag) for kind in ("image", "video") for tag in TAGS[kind]]
        return cls(ids[0], ids[1], image_id, ids[2], ids[3], image_id if found is None else found)


class Expanded(NamedTuple):
    """A sequence of T tokens: `ids` and `labels` int32 [T]; `modality` int8 [T] (see packed_batch.Modality), also of
    the tags around placeholders; `first_tokens` int64 [N]: where the placeholders of each picture or video begin.
    """

    ids: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    first_tokens: np.ndarray

    def kinds(self, media: MediaTokens) -> np.ndarray:
        """The modality of placeholders; 0 for all other tokens, also for the tags: int8 [T]."""
        return np.where(np.isin(self.ids, (media.image, media.video)), self.modality, np.int8(Modality.TEXT))

    def positions(self, grid: np.ndarray, media: MediaTokens, rule: PositionRule, patching: Patching) -> np.ndarray:
        """Positions (time, height, width) of pictures and videos of these grids and of the text: int64 [T, 3]."""
        return token_positions(self.kinds(media), grid, rule=rule, merge_size=patching.spatial_merge)


def expand(ids: Sequence[int], labels: Sequence[int], tokens: Sequence[int], media: MediaTokens) -> Expanded:
    """Repeat each placeholder as often as `tokens` says, in order; `labels` are shifted, as Template.labels gives them.

    No label is ever at a placeholder, since media are part of prompts.
    """
    short, targets = np.asarray(ids, np.int32), np.asarray(labels, np.int32)
    before = np.append(np.int32(-1), short[:-1])
    is_video = (short == media.video) & (before == media.video_start)
    is_media = is_video | ((short == media.image) & (before == media.image_start))
    assert is_media.sum() == len(tokens), "the template shows every picture once"
    assert (targets[is_media] == IGNORE).all(), "media are part of prompts"
    kinds = np.where(is_video, Modality.VIDEO, Modality.IMAGE)[is_media]
    modality = np.zeros(len(short), np.int8)
    for offset in (-1, 0, 1):
        modality[np.flatnonzero(is_media) + offset] = kinds
    counts = np.ones(len(short), np.int64)
    counts[is_media] = tokens
    first_tokens = (np.cumsum(counts) - counts)[is_media]
    return Expanded(np.repeat(short, counts), np.repeat(targets, counts), np.repeat(modality, counts), first_tokens)
