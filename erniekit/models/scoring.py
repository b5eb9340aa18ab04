"""Scores a model's predictions of the labels of a batch: loss, accuracy, and log-probabilities of pairs of answers."""

import math
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.lm import chunks_of, label_nll
from erniekit.losses.log_probs import answer_log_probs, token_log_probs
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.nn.narrow import gather
from erniekit.parallel import comm

LARGEST_EXPONENT = 700.0


class Score(NamedTuple):
    """Sums over the labelled tokens of one or more batches; scores add up with `+`."""

    sum_nll: float = 0.0  # of -log p(label), natural logarithm
    num_tokens: int = 0
    num_correct: int = 0  # labels that are the model's first choice

    def __add__(self, other: "Score") -> "Score":  # type: ignore[override]
        return Score(
            self.sum_nll + other.sum_nll, self.num_tokens + other.num_tokens, self.num_correct + other.num_correct
        )

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


@paddle.no_grad()
def score_hidden(model: CausalLM, hidden_TD: paddle.Tensor, places: np.ndarray, labels: np.ndarray) -> Score:
    """Score the rows `places` of the hidden states of all tokens behind the final norm [T, D], whose labels are
    `labels`. Logits exist a chunk at a time. Logits that are not finite give a NaN.
    """
    score = Score()
    if not len(places):
        return score
    for chunk in chunks_of(hidden_TD, model.config.vocab_size, len(places)):
        rows = places[chunk]
        targets = paddle.to_tensor(labels[chunk].astype(np.int64))
        logits = model.head(gather(hidden_TD, paddle.to_tensor(rows))).astype("float32")
        nll = label_nll(logits, targets)
        # Paddle's CPU softmax takes NaN and infinite logits for equal ones, which hides them; times 0 they are NaN.
        nll += logits.sum(axis=-1) * 0
        correct = int((logits.argmax(axis=-1) == targets).sum())
        score += Score(float(nll.numpy().sum(dtype=np.float64)), len(rows), correct)
    return score


def pair_log_probs(
    model: CausalLM, hidden_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch, max_logit_tokens: int
) -> paddle.Tensor:
    """Log-probabilities of the batch's answers (PackedBatch.answers: of pairs [2N], of judged answers [N]), with
    gradients, from the hidden states of all tokens as the head takes them [T, D]; at most `max_logit_tokens` tokens'
    logits exist at a time. Context ranks call it together, and each gets the sums over all tokens: what a rank makes
    of them is its share of the loss (`share_of_loss`).
    """
    own = None if model.context is None else inputs.select(batch.supervised)
    sums = answer_log_probs(
        hidden_TD, model.output_head(), batch.labels, batch.segment_ids, batch.answers, max_logit_tokens, own=own
    )
    return sums if model.context is None else comm.sum_over(sums, model.context.group)


def nothing_through_head(model: CausalLM, hidden_TD: paddle.Tensor) -> paddle.Tensor:
    """0 [1], through the head. A rank without answers runs the same graph as the others, so that it completes its
    gradients, and starts its collectives, in the same order. hidden: as the head takes it [T, D].
    """
    return token_log_probs(hidden_TD[:1], model.output_head(), paddle.zeros([1], dtype="int64"), 1) * 0.0


def share_of_loss(model: CausalLM) -> float:
    """What a loss of whole documents is multiplied with on each of the ranks that compute it alike."""
    return 1.0 if model.context is None else 1.0 / model.context.group.size


def last_token_scores(
    model: CausalLM, hidden_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch, segments: np.ndarray
) -> paddle.Tensor:
    """The scores of a reward model for the last token of each of the given segments: fp32 [N], with gradients. hidden:
    as the head takes it [T, D]. Context ranks call it together, as pair_log_probs.
    """
    assert model.score is not None, "only a reward model has scores"
    ends = (np.cumsum(batch.segment_lengths) - 1)[segments]
    if model.context is None:
        return model.score(gather(hidden_TD, paddle.to_tensor(ends)))
    ascending = np.argsort(ends)
    mask, found = inputs.select(ends[ascending])
    rows, is_here = np.zeros(len(ends), np.int64), np.zeros(len(ends), np.float32)
    rows[ascending[mask]], is_here[ascending[mask]] = found, 1.0
    scores = model.score(gather(hidden_TD, paddle.to_tensor(rows)))  # also where there is none: the same graph
    return comm.sum_over(scores * paddle.to_tensor(is_here), model.context.group)
