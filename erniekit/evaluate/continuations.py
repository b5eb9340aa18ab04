"""The log-probabilities of short continuations of long prompts, on one rank or many.

Continuations that differ in their last token alone, such as the letters of a multiple-choice question, are scored by
one pass over their prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import paddle

from erniekit.data.packed_batch import IGNORE, Document, PackedBatch, join_rows, make_row
from erniekit.losses.lm import chunks_of, label_nll
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.parallel import comm
from erniekit.training.forward_pass import final_norm, forward_pass


@dataclass
class _Row:
    """Tokens that go through the model, of which those from number `first` on predict scored tokens. `asked`: (number
    of the continuation, the tokens that it has there).
    """

    ids: tuple[int, ...]
    first: int
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


def log_likelihoods(
    model: CausalLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """log p(continuation | prompt), natural logarithm, of each pair (prompt, continuation) of token ids, neither of
    which is empty. Of a pair longer than the model's context, the beginning of the prompt is left out.

    `batch_size` rows of a data rank go through the model at once, the longest first; `on_rows` hears how many of all
    rows have. Every rank calls it with the same pairs and gets all results. NaN where the logits are not finite.
    """
    rows = _rows(pairs, model.config.max_position_embeddings)
    mesh = model.mesh
    step = batch_size * mesh.degrees.data
    sums = np.zeros(len(pairs), np.float64)
    for start in range(0, len(rows), step * mesh.degrees.pipeline):
        groups = [
            rows[begin : begin + step][mesh.data :: mesh.degrees.data]
            for begin in range(start, min(start + step * mesh.degrees.pipeline, len(rows)), step)
        ]
        batches = [join_rows([_packed(row) for row in group]) for group in groups]
        forward_pass(model, batches, partial(_add, model, groups, sums))
        on_rows(min(start + step * mesh.degrees.pipeline, len(rows)), len(rows))
    shares = comm.gather_objects(sums.tolist() if mesh.holds_results else None, mesh.world_group)
    return np.sum([share for share in shares if share is not None], axis=0).tolist()


def _rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], context: int) -> list[_Row]:
    """The rows that score all pairs, the longest first."""
    rows: dict[tuple[tuple[int, ...], int], _Row] = {}
    for number, (prompt, continuation) in enumerate(pairs):
        assert prompt and continuation, "there is something to predict from, and to predict"
        whole = tuple(prompt) + tuple(continuation)
        ids = whole[max(0, len(whole) - context - 1) : -1]
        first = len(ids) - len(continuation)
        row = rows.setdefault((ids, first), _Row(ids, first))
        row.asked.append((number, tuple(continuation)))
    return sorted(rows.values(), key=lambda row: -len(row.ids))


def _packed(row: _Row) -> PackedBatch:
    ids = np.array(row.ids, np.int32)
    return make_row([Document(ids, np.full(len(ids), IGNORE, np.int32))], ["eval_benchmark_path"])


@paddle.no_grad()
def _add(
    model: CausalLM,
    groups: Sequence[Sequence[_Row]],
    sums: np.ndarray,
    number: int,
    x_TD: paddle.Tensor,
    inputs: ModelInputs,
) -> None:
    """Add the log-probabilities of a microbatch to `sums`, from the last layer's output."""
    hidden_TD = model.enter_head(final_norm(model, x_TD))
    entries: list[tuple[int, int, int]] = []  # (token that predicts, token predicted, continuation)
    start = 0
    for row in groups[number]:
        for continuation, tokens in row.asked:
            entries += [(start + row.first + at, token, continuation) for at, token in enumerate(tokens)]
        start += len(row.ids)
    if not entries:
        return
    places, targets, owners = np.array(entries, np.int64).T
    for chunk in chunks_of(hidden_TD, model.config.vocab_size, len(places)):
        logits = model.head(paddle.gather(hidden_TD, paddle.to_tensor(places[chunk]))).astype("float32")
        nll = label_nll(logits, paddle.to_tensor(targets[chunk]))
        # Paddle's CPU softmax takes NaN and infinite logits for equal ones, which hides them; times 0 they are NaN.
        nll += logits.sum(axis=-1) * 0
        np.subtract.at(sums, owners[chunk], nll.numpy().astype(np.float64))
