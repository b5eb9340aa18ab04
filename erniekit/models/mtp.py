"""Multi-token prediction: depth d (from 0) predicts token t + 2 + d from the main path's state at t and the embedding
of token t + 1 + d.

h_d = Block_d(W_d [RMSNorm(embed(x_{t+1+d})) ; RMSNorm(h_{d-1})]), h_{-1} = the main path's last layer output before its
final norm; logits through the model's own final norm and head (DeepSeek-V3, arXiv 2412.19437, eq. 21-23; ERNIE 4.5 uses
one depth).
"""

from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.models.decoder import Decoder, Hidden
from erniekit.models.inputs import ModelInputs, embed_ahead
from erniekit.moe.layer import TokenInfo
from erniekit.nn.attention import AttentionContext
from erniekit.nn.narrow import concat


@dataclass(frozen=True)
class Depth:
    """One depth's output: `normed` [T, D], and for each position which main label it predicts: `target` [T] token
    numbers, `valid` [T] (inside the document).
    """

    normed: paddle.Tensor
    target: np.ndarray
    valid: np.ndarray


def predict_ahead(decoder: Decoder, hidden: Hidden, inputs: ModelInputs) -> list[Depth]:
    """Run every depth. A position whose token t + 1 + d lies in another document, or nowhere, is not valid and stands
    after all valid ones of its document, so causal attention keeps it from them.

    With labels already shifted (labels[t] = token t + 1), depth d at t is scored against labels[target[t]] where valid.
    """
    assert decoder.embed_tokens is not None and decoder.norm is not None, "this process holds no head"
    depths = []
    dense = TokenInfo([hidden.last.shape[0]])  # the blocks have no experts
    previous = hidden.last
    first = decoder.config.num_hidden_layers  # the blocks are numbered behind the layers
    for d, block in enumerate(decoder.mtp_block):
        ahead, target, valid = embed_ahead(decoder.embed_tokens, inputs, 1 + d)
        joined = concat([decoder.mtp_emb_norm[d](ahead), decoder.mtp_hidden_norm[d](previous)], axis=-1)
        previous, _ = block(decoder.mtp_linear_proj[d](joined), inputs.attention, dense, first + d)
        depths.append(Depth(decoder.norm(previous), target, valid))
    return depths


def predict_behind(
    decoder: Decoder, hidden_TD: paddle.Tensor, next_ids_T: paddle.Tensor, context: AttentionContext
) -> paddle.Tensor:
    """Depth 0 for tokens of a running generation: states before the final norm [T, D] and the token behind each ->
    normed states [T, D], of which the head makes scores of the token behind that. `context`: the cache, in whose
    present step the block is one layer more.
    """
    assert decoder.embed_tokens is not None and decoder.norm is not None, "this process holds no head"
    ahead = decoder.embed_tokens(next_ids_T)
    joined = concat([decoder.mtp_emb_norm[0](ahead), decoder.mtp_hidden_norm[0](hidden_TD)], axis=-1)
    dense = TokenInfo([hidden_TD.shape[0]])
    x_TD, _ = decoder.mtp_block[0](decoder.mtp_linear_proj[0](joined), context, dense, decoder.config.num_hidden_layers)
    return decoder.norm(x_TD)
