"""How well a model predicts given labels: loss and accuracy of a batch, without gradients."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import paddle

from erniekit.losses.lm import chunks_of, label_nll
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import packed_inputs

IGNORE = -100  # a label with no loss
LARGEST_EXPONENT = 700.0


class Score(NamedTuple):
    """Sums over the labelled tokens of one or more batches; scores add up with `+`."""

    sum_nll: float = 0.0  # of -log p(label), natural logarithm
    num_tokens: int = 0
    num_correct: int = 0  # labels that are the model's first choice

    def __add__(self, other: "Score") -> "Score":  # type: ignore[override]
        return Score(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Loss (nats a token), perplexity (at most exp(700), the largest that is sure to have a float) and accuracy.
        There must be tokens.
        """
        loss = self.sum_nll / self.num_tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
            "token_accuracy": self.num_correct / self.num_tokens,
        }


class Labelled(Protocol):
    """What is scored of a batch (erniekit.data.batch.Batch): see `batch_nll`."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    num_samples: int


def score_batches(model: CausalLM, batches: Iterable[Labelled], most: int = -1) -> tuple[Score, int]:
    """The score of the batches, and the number of their samples; of the first `most` batches if that is positive."""
    total, num_samples = Score(), 0
    for batch in itertools.islice(batches, most if most > 0 else None):
        total += batch_nll(model, batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
        num_samples += batch.num_samples
    return total, num_samples


@paddle.no_grad()
def batch_nll(
    model: CausalLM,
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> Score:
    """Score a batch of B rows of S tokens.

    input_ids, position_ids int64 [B, S]; labels int64 [B, S]: labels[b, t] is the token that should follow
    input_ids[b, :t + 1], or -100; segment_ids [B, S]: 0 is padding, other numbers are the documents of a row (default:
    each row is one document). Padding is cut out before the model runs, and logits exist only where labels are, a chunk
    at a time. Logits that are not finite give a NaN.
    """
    segments = np.ones_like(input_ids) if segment_ids is None else segment_ids.astype(np.int64)
    real = segments != 0
    assert not (labels[~real] != IGNORE).any(), "padding carries labels"
    flat_labels = labels[real]
    places = np.flatnonzero(flat_labels != IGNORE)
    if not len(places):
        return Score()
    # All real tokens in one row; (row, segment) becomes the segment, so that a row's last document and the next row's
    # first stay apart.
    segments = segments + (segments.max() + 1) * np.arange(len(segments))[:, None]
    positions = None if position_ids is None else position_ids[real]
    hidden = model.model(packed_inputs(model, input_ids[real], segments[real], positions)).normed
    return score_hidden(model, hidden, places, flat_labels)


@paddle.no_grad()
def score_hidden(model: CausalLM, hidden_TD: paddle.Tensor, places: np.ndarray, labels_T: np.ndarray) -> Score:
    """Score the token numbers `places`, which have labels, from the hidden states of all tokens behind the final norm
    [T, D].
    """
    score = Score()
    for chunk in chunks_of(hidden_TD, model.config.vocab_size, len(places)):
        rows = places[chunk]
        targets = paddle.to_tensor(labels_T[rows].astype(np.int64))
        logits = model.head(paddle.gather(hidden_TD, paddle.to_tensor(rows))).astype("float32")
        nll = label_nll(logits, targets)
        # Paddle's CPU softmax takes NaN and infinite logits for equal ones, which hides them; times 0 they are NaN.
        nll += logits.sum(axis=-1) * 0
        correct = int((logits.argmax(axis=-1) == targets).sum())
        score += Score(float(nll.numpy().sum(dtype=np.float64)), len(rows), correct)
    return score
