"""Multi-token prediction: depth d (from 0) predicts token t + 2 + d from the main path's state at t and the embedding
of token t + 1 + d.

h_d = Block_d(W_d [RMSNorm(embed(x_{t+1+d})) ; RMSNorm(h_{d-1})]), h_{-1} = the main path's last layer output before its
final norm; logits through the model's own final norm and head (DeepSeek-V3, arXiv 2412.19437, eq. 21-23; ERNIE 4.5 uses
one depth).
"""

import paddle

from erniekit.models.decoder import Decoder, Hidden
from erniekit.models.inputs import ModelInputs, embed_ahead
from erniekit.moe.layer import TokenInfo
from erniekit.nn.attention import AttentionContext
from erniekit.nn.narrow import concat


def predict_ahead(decoder: Decoder, hidden: Hidden, inputs: ModelInputs) -> list[paddle.Tensor]:
    """Run every depth; the normed states [T, D] of each. A position whose token t + 1 + d lies in another document, or
    nowhere, predicts nothing, and stands after all others of its document, so causal attention keeps it from them.
    """
    assert decoder.embed_tokens is not None and decoder.norm is not None, "this process holds no head"
    depths = []
    dense = TokenInfo([hidden.last.shape[0]])  # the blocks have no experts
    previous = hidden.last
    first = decoder.config.num_hidden_layers  # the blocks are numbered behind the layers
    for d, block in enumerate(decoder.mtp_block):
        ahead = embed_ahead(decoder.embed_tokens, inputs, 1 + d)
        joined = concat([decoder.mtp_emb_norm[d](ahead), decoder.mtp_hidden_norm[d](previous)], axis=-1)
        previous, _ = block(decoder.mtp_linear_proj[d](joined), inputs.attention, dense, first + d)
        depths.append(decoder.norm(previous))
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
