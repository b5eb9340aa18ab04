"""The log-probabilities that a model gives to the tokens of a prompt itself."""

from collections.abc import Sequence

import numpy as np
import paddle

from erniekit.data.packed_batch import IGNORE, Document, make_row
from erniekit.generation.choosing import NO_SCORES, likeliest
from erniekit.generation.request import TokenScore
from erniekit.lora.several import rows_of
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs
from erniekit.utils.errors import CheckpointError

_PIECE = 256  # tokens whose scores [V] are in memory at a time


@paddle.no_grad()
def score_prompt(
    model: CausalLM, prompt: Sequence[int], num_top: int, adapter: str | None = None
) -> list[TokenScore | None]:
    """A score for each token of a prompt, given those before it, with the `num_top` likeliest tokens; None for the
    first, which nothing precedes. One process has the whole model, which is in eval mode. The layers see the prompt at
    once, the head sees it in pieces: the scores of all its tokens would take more memory than anything else. `adapter`:
    its name, as in Request. Raises CheckpointError for scores that are not finite.
    """
    assert model.mesh.degrees.world == 1, "one process scores a prompt"
    ids = np.asarray(prompt, np.int32)
    batch = make_row([Document(ids, np.full(len(ids), IGNORE, np.int32))], ["prompt"])
    with rows_of(model, [adapter]):
        normed_SD = model.model(batch_inputs(model, batch)).normed
    scores: list[TokenScore | None] = [None]
    for start in range(0, len(prompt) - 1, _PIECE):
        piece_SD = normed_SD[start : min(start + _PIECE, len(prompt) - 1)]
        rows_SV = model.head(piece_SD).astype("float32").numpy().astype(np.float64)
        if not np.isfinite(rows_SV).all():
            raise CheckpointError(NO_SCORES)
        rows_SV -= rows_SV.max(axis=1, keepdims=True)
        rows_SV -= np.log(np.exp(rows_SV).sum(axis=1, keepdims=True))
        for row, token in zip(rows_SV, prompt[start + 1 :], strict=False):
            top = tuple((int(i), float(row[i])) for i in likeliest(row, num_top))
            scores.append(TokenScore(float(row[token]), top))
    return scores
