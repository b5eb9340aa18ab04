"""Chooses the next token of each row of a batch, on the rank that has the scores, and tells every rank of the copy."""

from collections.abc import Sequence

import numpy as np
import paddle

from erniekit.generation.drawing import DrawSettings, draw_rows
from erniekit.generation.ranks import chooses, from_chooser
from erniekit.generation.request import Generation, TokenScore
from erniekit.generation.sampling import choose
from erniekit.parallel.mesh import Mesh
from erniekit.utils import heartbeat
from erniekit.utils.errors import CheckpointError

_NOT_FINITE = -1  # in the place of a token: the scores have no meaning
_PROBLEM = "the model gives scores that are not finite, so its weights are not, or are too large"
_BEYOND = "or the prompt goes beyond the range of compute_type"
NO_SCORES = f"{_PROBLEM}, {_BEYOND}. Use compute_type: fp32, or an earlier checkpoint."


def choose_next(scores_BV: paddle.Tensor | None, rows: Sequence[Generation], mesh: Mesh) -> list[int]:
    """Choose the next token of each of `rows`, whose scores [B, V] the choosing rank gives, and append it to its answer
    on every rank.

    Any token chosen from scores that are not finite would be noise: they end a row that fails alone (Request) with an
    error, and for another row CheckpointError is raised. The token of a row that has failed is 0 in the result.
    """
    heartbeat.waiting(None)
    width = max((row.request.num_scores for row in rows if row.request.num_scores is not None), default=-1)
    table = np.full((len(rows), 1 if width < 0 else 2 + 2 * width), _NOT_FINITE, dtype=np.int64)
    if chooses(mesh):
        assert scores_BV is not None, "the last stage has the scores"
        _fill_finite(table, scores_on_host(scores_BV), rows)
    table = from_chooser(table, mesh)
    _fail([row for row, token in zip(rows, table[:, 0].tolist(), strict=True) if token == _NOT_FINITE])
    table[table[:, 0] == _NOT_FINITE, 0] = 0
    tokens = table[:, 0].tolist()
    if width < 0:
        for row, token in zip(rows, tokens, strict=True):
            if not row.error:
                row.append(token)
        return tokens
    logprobs = table[:, 1].copy().view(np.float64).tolist()
    for row, token, logprob, line in zip(rows, tokens, logprobs, table, strict=True):
        if row.error:
            continue
        count = row.request.num_scores
        row.append(token, None if count is None else TokenScore(logprob, _top_of(line, count) if count else ()))
    return tokens


def _fail(rows: Sequence[Generation]) -> None:
    """End rows whose scores are not finite."""
    if not all(row.request.fails_alone for row in rows):
        raise CheckpointError(f"{_PROBLEM}. Use an earlier checkpoint.")
    for row in rows:
        row.fail(NO_SCORES)


def scores_on_host(scores_BV: paddle.Tensor) -> np.ndarray:
    """Scores as fp32 [B, V] on the host; on a CPU in the tensor's own memory."""
    scores_BV = scores_BV.astype("float32")
    return np.from_dlpack(scores_BV) if scores_BV.place.is_cpu_place() else scores_BV.numpy()


def _fill_finite(table: np.ndarray, scores_BV: np.ndarray, rows: Sequence[Generation]) -> None:
    """See `_fill`; the lines of rows whose scores are not finite are left as they are."""
    if np.isfinite(scores_BV.sum()):
        return _fill(table, scores_BV, rows)
    finite = np.flatnonzero(np.isfinite(scores_BV.sum(axis=-1)))
    if len(finite):
        part = table[finite]
        _fill(part, scores_BV[finite], [rows[int(place)] for place in finite])
        table[finite] = part


def _fill(table: np.ndarray, scores_BV: np.ndarray, rows: Sequence[Generation]) -> None:
    """Writes into each row of the table: the token, the bits of its log-probability (float64), and the likeliest tokens
    followed by the bits of theirs; the numbers of a row that asks for no, or fewer, scores are left as they are.
    """
    if table.shape[1] == 1 and all(row.is_choice_plain for row in rows):
        table[:, 0] = scores_BV.argmax(axis=-1)
        return
    alike: dict[DrawSettings, list[int]] = {}
    for place, row in enumerate(rows):
        settings = row.draw_settings
        if settings is None:
            _fill_line(table[place], scores_BV[place], row)
        else:
            alike.setdefault(settings, []).append(place)
    for settings, places in alike.items():
        every = len(places) == len(rows)
        of_these = scores_BV if every else scores_BV[places]
        tokens, logprobs = draw_rows(of_these, settings, [rows[place].generator for place in places])
        table[places, 0] = tokens
        if logprobs is not None:
            table[places, 1] = logprobs.view(np.int64)


def _fill_line(line: np.ndarray, scores_V: np.ndarray, row: Generation) -> None:
    """See `_fill`."""
    line[0] = choose_alone(scores_V, row)
    count = row.request.num_scores
    if count is None:
        return
    logprobs = _log_softmax(scores_V, row.request.score_temperature)
    tokens = likeliest(logprobs, count)
    line[1:2] = logprobs[[line[0]]].view(np.int64)
    line[2 : 2 + len(tokens)] = tokens
    line[2 + count : 2 + count + len(tokens)] = logprobs[tokens].view(np.int64)


def likeliest(logprobs_V: np.ndarray, count: int) -> np.ndarray:
    """The `count` likeliest tokens, the likeliest first, of equal ones those with the smaller ids first. Sorting the
    whole vocabulary would take longer than the pass of a small model.
    """
    if not count:
        return np.zeros(0, np.int64)
    if count >= len(logprobs_V):
        return np.argsort(-logprobs_V, kind="stable")
    tokens = np.flatnonzero(logprobs_V >= np.partition(logprobs_V, -count)[-count])
    return tokens[np.argsort(-logprobs_V[tokens], kind="stable")][:count]


def choose_alone(scores_V: np.ndarray, row: Generation) -> int:
    """The token that a row chooses by these scores, which its answer does not get."""
    if row.is_choice_plain:
        return int(scores_V.argmax())
    request, ids = row.request, row.answer.ids
    allowed = None if request.constraint is None else request.constraint(ids)
    if allowed is not None:
        scores_V = np.where(allowed, scores_V, np.float32(-np.inf))
    early = request.limits.stop_ids if len(ids) < request.limits.min_new_tokens else ()
    return choose(scores_V, request.prompt, ids, request.sampling, row.generator, (*request.never, *early))


def _log_softmax(scores_V: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities [V] float64 of scores divided by a temperature."""
    scaled = scores_V.astype(np.float64) / temperature
    scaled -= scaled.max()
    return scaled - np.log(np.exp(scaled).sum())


def _top_of(line: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens in a row of the table, with their log-probabilities; see `_fill`."""
    tokens, bits = line[2 : 2 + count], line[2 + count : 2 + 2 * count]
    pairs = zip(tokens.tolist(), bits.view(np.float64).tolist(), strict=True)
    return tuple((token, logprob) for token, logprob in pairs if token >= 0)
