"""Images and videos of prompts: decoded, and step by step as each pass of the model takes them.

Legend: B rows, W tokens of the widest row of a step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.prompt import PicturePrompt
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import EncodedPictures
from erniekit.models.pictures import PictureTables


class Step(NamedTuple):
    """What models.decoder.CausalLM.extend takes beside tokens: position_ids int64 [B, W, 3], modality int64 [B, W], and
    the features of the pictures among the tokens.
    """

    position_ids: np.ndarray
    modality: np.ndarray
    pictures: EncodedPictures | None


class PromptPictures:
    """The images and videos of the tokens that a stepper is fed, one entry a row; None: a row of text alone. Encoded
    once, however many passes the tokens take.
    """

    def __init__(self, model: CausalLM, rows: Sequence[PictureTables | None]) -> None:
        self._rows = rows
        self._encoded = [_encode(model, row) for row in rows]

    def step(self, start: int, counts_B: np.ndarray, next_positions_B: np.ndarray) -> Step:
        """The tokens [start, start + counts[b]) of each row b, which has been fed all before them; text alone counts on
        from next_positions.
        """
        width = int(counts_B.max())
        positions = np.repeat((next_positions_B[:, None] + np.arange(width))[:, :, None], 3, axis=2)
        modality = np.zeros(positions.shape[:2], np.int64)
        features, places = [], []
        for b, (row, encoded, count) in enumerate(zip(self._rows, self._encoded, counts_B.tolist(), strict=True)):
            if row is None:
                continue
            positions[b, :count] = row.positions[start : start + count]
            modality[b, :count] = row.modality[start : start + count]
            if encoded is not None:
                own = np.flatnonzero((encoded.places >= start) & (encoded.places < start + count))
                if len(own):
                    features.append(paddle.gather(encoded.features, paddle.to_tensor(own)))
                    places.append(encoded.places[own] - start + b * width)
        pictures = EncodedPictures(paddle.concat(features), np.concatenate(places)) if features else None
        return Step(positions, modality, pictures)


def tables_of(
    prompt: PicturePrompt, start: int = 0, decode: Callable[[MediaPlan], np.ndarray] = MediaPlan.patches
) -> PictureTables:
    """The tokens of a prompt from `start` on, which is not inside a picture, with the pictures among them, decoded by
    `decode`. BadRecord for one that cannot be.
    """
    new = [i for i, first in enumerate(prompt.first_tokens.tolist()) if first >= start]
    plans = [prompt.plans[i] for i in new]
    places = [np.arange(prompt.first_tokens[i], prompt.ends[i]) - start for i in new]
    patches = [decode(plan) for plan in plans]
    return PictureTables(
        patches=np.concatenate(patches) if patches else np.zeros((0, 0), np.uint8),
        grid=np.array([plan.geometry.grid for plan in plans], np.int64).reshape(-1, 3),
        places=np.concatenate([np.zeros(0, np.int64), *places]),
        modality=prompt.modality[start:].astype(np.int64),
        positions=prompt.positions[start:],
    )


def num_shared(before: PicturePrompt | None, now: PicturePrompt, count: int) -> int:
    """How many of the first `count` token ids, which two prompts of a conversation have in common, also stand for the
    same pictures. The number never ends inside a picture. None as the prompt before: one of text alone.
    """
    earlier = () if before is None else before.plans
    for i, (first, end) in enumerate(zip(now.first_tokens.tolist(), now.ends.tolist(), strict=True)):
        if first >= count:
            break
        if end > count or i >= len(earlier) or now.plans[i].part is not earlier[i].part:
            return int(first)
    return count


@paddle.no_grad()
def _encode(model: CausalLM, row: PictureTables | None) -> EncodedPictures | None:
    if row is None or not model.shard.has_embedding:  # other pipeline stages get hidden states
        return None
    pictures = row.on_device()
    return None if pictures is None else model.model.encode(pictures)
