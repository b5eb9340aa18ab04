"""Speculative decoding with a model's own prediction block (multi-token prediction, models/mtp.py): the block drafts
the token behind the next one, and the following pass checks it beside the next token itself.

A draft is kept if it is the token that is chosen anyway, from the scores of the whole model and with the row's own
random draws. So answers have the tokens that they have without drafts, up to tokens that tie to within rounding. A pass
then brings one or two tokens a row. For models of text, in one process.

The block has keys and values of its own, as one more layer of the cache: at the place of token t they are those of
(state of t, token t + 1), so they are written once token t + 1 has been chosen.
"""

import copy
from collections.abc import Sequence

import numpy as np
import paddle

from erniekit.generation.choosing import choose_alone, choose_next
from erniekit.generation.request import Generation
from erniekit.generation.steppers import CachedStepper, pad_right
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import cached_inputs
from erniekit.models.mtp import predict_behind
from erniekit.nn import decoding
from erniekit.utils.errors import ConfigError


class Drafting:
    """Drafts tokens for the running rows of an engine. num_drafts: drafts so far that were checked; num_accepted: those
    that were kept.
    """

    def __init__(self, model: CausalLM) -> None:
        """Raises ConfigError for a model that cannot draft."""
        require_drafts(model.config)
        assert model.mesh.degrees.world == 1, "one process drafts"
        self.model = model
        self.num_drafts = self.num_accepted = 0

    @property
    def line(self) -> str:
        """A line for the log."""
        share = self.num_accepted / max(1, self.num_drafts)
        return f"drafts: {self.num_accepted:,} of {self.num_drafts:,} were right ({share:.0%})"

    @decoding.running()
    def read(
        self, stepper: CachedStepper, pieces: Sequence[Sequence[int]], following: Sequence[int | None]
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Feed the next tokens of prompts -> (scores behind each row's last one [B, V], its state [B, D]). following:
        the token of the prompt behind each piece; None: the prompt ends there (see `draft_first`).
        """
        lengths = np.array([len(piece) for piece in pieces])
        ahead = [[*piece[1:], next_one or 0] for piece, next_one in zip(pieces, following, strict=True)]
        hidden_TD, normed_TD = self._pass(stepper, pad_right(pieces, 0))
        self._predict(stepper, hidden_TD, pad_right(ahead, 0))
        stepper.cache.end_step(lengths)
        last = _numbers(lengths, pad_right(pieces, 0).shape[1])
        return self.model.head(paddle.gather(normed_TD, last)), paddle.gather(hidden_TD, last)

    @decoding.running()
    def draft_first(self, stepper: CachedStepper, state_BD: paddle.Tensor, rows: Sequence[Generation]) -> None:
        """Draft for rows whose prompts have been read and whose first token has been chosen."""
        cache = stepper.cache
        cache.lengths = cache.lengths - 1  # the block is yet to see the prompt's last token
        cache.begin_step(1)
        predicted_BD = self._predict(stepper, state_BD, np.array([[_last(row)] for row in rows]))
        cache.end_step(np.ones(len(rows), np.int64))
        self._choose_drafts(predicted_BD, rows)

    @decoding.running()
    def continue_rows(self, stepper: CachedStepper, rows: Sequence[Generation]) -> None:
        """Continue every row by one token, or by two where the draft is right, and draft again."""
        model, batch = self.model, len(rows)
        drafts = [row.draft for row in rows]
        hidden_TD, normed_TD = self._pass(stepper, np.array([[_last(row), row.draft] for row in rows]))
        scores = model.head(normed_TD).reshape([batch, 2, -1])
        first = choose_next(scores[:, 0], rows, model.mesh)
        right = [place for place, row in enumerate(rows) if not row.answer.stop and first[place] == drafts[place]]
        next_ids = np.array([[token, 0] for token in first])
        if right:
            second = choose_next(
                paddle.gather(scores[:, 1], paddle.to_tensor(right)), [rows[place] for place in right], model.mesh
            )
            next_ids[right, 1] = second
        self.num_drafts += sum(place in right or not row.answer.stop for place, row in enumerate(rows))
        self.num_accepted += len(right)
        counts = np.ones(batch, np.int64)
        counts[right] = 2
        predicted_TD = self._predict(stepper, hidden_TD, next_ids)
        stepper.cache.end_step(counts)
        self._choose_drafts(paddle.gather(predicted_TD, _numbers(counts, 2)), rows)

    def _pass(self, stepper: CachedStepper, ids_BS: np.ndarray) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Tokens [B, S] through all layers, in a step that the caller ends -> states before and behind the final norm,
        [B*S, D] each.
        """
        hidden = self.model.model(cached_inputs(self.model, ids_BS, stepper.cache))
        return hidden.last, hidden.normed

    def _predict(self, stepper: CachedStepper, hidden_TD: paddle.Tensor, next_ids_BS: np.ndarray) -> paddle.Tensor:
        return predict_behind(self.model.model, hidden_TD, paddle.to_tensor(next_ids_BS.reshape(-1)), stepper.cache)

    def _choose_drafts(self, predicted_BD: paddle.Tensor, rows: Sequence[Generation]) -> None:
        """A row drafts what it would choose by these scores, with the random draw that checks it."""
        scores_BV = self.model.head(predicted_BD)
        if all(row.is_choice_plain for row in rows):
            for row, token in zip(rows, scores_BV.argmax(axis=-1).tolist(), strict=True):
                row.draft = token
            return
        for row, scores_V in zip(rows, scores_BV.astype("float32").numpy(), strict=True):
            if row.answer.stop or not np.isfinite(scores_V.sum()):
                continue  # any token may be a draft
            twin = copy.copy(row)
            twin.generator = copy.deepcopy(row.generator)
            row.draft = choose_alone(scores_V, twin)


def require_drafts(config: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot draft."""
    if not config.num_nextn_predict_layers:
        raise ConfigError(
            "num_speculative_tokens: the model has no block of multi-token prediction (num_nextn_predict_layers in its "
            "config.json) that could draft. Set it to 0."
        )
    if config.vision is not None:
        raise ConfigError("num_speculative_tokens: only models of text draft tokens. Set it to 0.")


def _last(row: Generation) -> int:
    """The last token of an answer, which may be an end token that is no part of it; 0 where it failed before any."""
    return row.answer.all_ids[-1] if row.answer.all_ids else 0


def _numbers(counts_B: np.ndarray, width: int) -> paddle.Tensor:
    """The number, among B * width tokens, of the last of the first `counts` of each row."""
    return paddle.to_tensor(np.arange(len(counts_B)) * width + counts_B - 1)
