"""Next-token scores for growing rows: with the KV cache, or by running whole rows to check the cache against."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import paddle

from erniekit.generation.pictures import PromptPictures
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureTables
from erniekit.nn.kv_cache import KVCache
from erniekit.utils.errors import UserError


class Stepper(Protocol):
    """Computes next-token scores for growing rows."""

    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor | None:
        """Append tokens to each row (at least one each) -> scores after each row's last token [B, V]; None on all
        pipeline stages but the last. `pictures`: the images and videos among these tokens, one entry a row; None: there
        are none.
        """
        ...


class CachedStepper:
    """Feeds only what is new; keys and values of the rest are cached."""

    piece_tokens = 2048  # of a single long prompt that go through the model at once

    def __init__(
        self, model: CausalLM, batch_size: int, cache: KVCache | None = None, records_experts: bool = False
    ) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size, records_experts) if cache is None else cache

    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor | None:
        """See Stepper. A long prompt of a single row goes in pieces: its activations are then never whole."""
        prompt, start = None if pictures is None else PromptPictures(self.model, pictures), 0
        while len(tokens) == 1 and len(tokens[0]) > self.piece_tokens:
            self.extend([tokens[0][: self.piece_tokens]], prompt, start)
            tokens, start = [tokens[0][self.piece_tokens :]], start + self.piece_tokens
        return self.extend(tokens, prompt, start)

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only, in this order; a row that is named twice continues twice."""
        self.cache.keep(rows)

    def extend(
        self, tokens: Sequence[Sequence[int]], prompt: PromptPictures | None = None, start: int = 0
    ) -> paddle.Tensor | None:
        """One pass; see Stepper.feed. `prompt`: the pictures of prompts of which `start` tokens have been fed."""
        lengths = np.array([len(row) for row in tokens])
        step = () if prompt is None else prompt.step(start, lengths, self.cache.next_position)
        return self.model.extend(pad_right(tokens, 0), lengths, self.cache, *step)


class UncachedStepper:
    """Runs the whole of every row at each step, in one process. Slow: it is there to check the cache against."""

    def __init__(self, model: CausalLM, batch_size: int) -> None:
        assert model.mesh.degrees.world == 1, "without a cache one process has the whole model"
        self.model = model
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]

    @paddle.no_grad()
    def feed(
        self, tokens: Sequence[Sequence[int]], pictures: Sequence[PictureTables | None] | None = None
    ) -> paddle.Tensor:
        """See Stepper."""
        if pictures is not None:
            raise UserError("use_cache: images and videos need the cache. Leave use_cache out.")
        for row, new in zip(self.rows, tokens, strict=True):
            row.extend(new)
        last = np.array([len(row) - 1 for row in self.rows])
        segments = pad_right([[1] * len(row) for row in self.rows], 0)
        logits = self.model(pad_right(self.rows, 0), segment_ids=segments)
        batch, width, vocab = logits.shape
        return paddle.gather(logits.reshape([batch * width, vocab]), paddle.to_tensor(np.arange(batch) * width + last))


def pad_right(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Ragged rows as int64 [B, longest]."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
