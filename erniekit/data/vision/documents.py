"""Documents with pictures that are no conversation: of pretraining text, and of a pair of answers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from erniekit.data.chat.pairs import join_pair
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.packed_batch import IGNORE, Document, DocumentPictures
from erniekit.data.vision.sequence import MediaTokens
from erniekit.utils.errors import DataError

Short = tuple[list[int], list[int]]  # ids with one placeholder for each medium, and shifted labels


def text_sequences(
    content: str | Sequence[dict[str, Any]],
    tokens: Sequence[int],
    media: MediaTokens,
    tokenizer: Tokenizer,
    max_seq_len: int,
) -> list[Short]:
    """A pretraining text as sequences of at most max_seq_len tokens, each picture whole in one of them; `tokens` are
    those of its media. Every token of text is a target, once, also where it begins the next sequence; what stands
    around and in pictures never is. Special tokens written in the text are read as plain text; eos ends it.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    ids: list[int] = []
    is_target: list[bool] = []
    weights: list[int] = []  # tokens that each id stands for
    remaining = iter(tokens)
    for part in parts:
        if part["type"] == "text":
            new = tokenizer.encode_plain(part["text"])
            ids, is_target, weights = ids + new, is_target + [True] * len(new), weights + [1] * len(new)
        else:
            is_image = part["type"] == "image"
            around = (media.image_start, media.image, media.image_end)
            ids += around if is_image else (media.video_start, media.video, media.video_end)
            is_target += [False] * 3
            weights += [1, next(remaining), 1]
    ids, is_target, weights = [*ids, tokenizer.eos_id], [*is_target, True], [*weights, 1]
    targets = np.where(is_target, ids, IGNORE)
    labels = [*targets[1:].tolist(), IGNORE]
    bounds = _bounds(ids, weights, is_target, max_seq_len)
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(bounds)]


def _bounds(ids: Sequence[int], weights: Sequence[int], is_target: Sequence[bool], max_seq_len: int) -> list[int]:
    """Where sequences begin, and the end. The three ids of a picture stay together."""
    bounds, length, i = [0], 0, 0
    while i < len(ids):
        step = 1 if is_target[i] else 3
        size = sum(weights[i : i + step])
        assert size <= max_seq_len, "VisionEncoder drops a text with such a picture"
        if length + size > max_seq_len:
            bounds.append(i)
            length = 0
        length, i = length + size, i + step
    return [*bounds, len(ids)]


def pair_document(chosen: Document, rejected: Document, score_delta: float | None) -> Document:
    """Two sequences with the same prompt, and the same pictures in it, as one document (see chat.pairs.join_pair)."""
    joined = join_pair(chosen, rejected, score_delta)
    ours, theirs = chosen.pictures, rejected.pictures
    if ours is None or theirs is None or joined.pair is None:
        return joined
    prompt = joined.pair.prompt
    if (ours.first_tokens >= prompt).any():
        raise DataError("an answer of the pair has pictures; they belong to the prompt")
    both = DocumentPictures(
        np.concatenate([ours.modality, theirs.modality[prompt:]]),
        np.concatenate([ours.positions, theirs.positions[prompt:]]),
        ours.grid,
        ours.first_tokens,
        ours.sources,
    )
    return joined._replace(pictures=both)
