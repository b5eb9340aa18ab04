"""Forward passes without gradients through a model that several ranks hold together: evaluation, references, decoding.

Tensor ranks run the same pass side by side. Through a pipeline the hidden states travel from stage to stage. Ranks that
share experts run their passes together, because the tokens of one may need the experts of another; a rank that has no
tokens left takes part with a token whose result nobody reads.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import paddle

from erniekit.models.config import ModelConfig
from erniekit.models.inputs import ModelInputs, packed_inputs
from erniekit.moe.layer import Routed
from erniekit.nn.norm import RMSNorm
from erniekit.nn.shard import RankShard
from erniekit.parallel import comm
from erniekit.parallel.context import ContextRanks
from erniekit.parallel.mesh import Mesh


class _Layers(Protocol):
    """The layers of a decoder that this process holds (models.decoder.Decoder)."""

    norm: RMSNorm | None

    def embed(self, inputs: ModelInputs) -> paddle.Tensor: ...

    def run(
        self, x_TD: paddle.Tensor, numbers: Sequence[int], inputs: ModelInputs
    ) -> tuple[paddle.Tensor, dict[tuple[int, int], Routed]]: ...


class RankModel(Protocol):
    """A model on its mesh (models.decoder.CausalLM): `chunks` are the layers of each chunk of this pipeline stage."""

    config: ModelConfig
    shard: RankShard
    context: ContextRanks | None
    model: _Layers
    mesh: Mesh
    chunks: tuple[tuple[int, ...], ...]
    residual_dtype: paddle.dtype

    @property
    def token_multiple(self) -> int: ...

    def enter_head(self, normed_TD: paddle.Tensor) -> paddle.Tensor: ...


@paddle.no_grad()
def run_stages(model: RankModel, inputs: ModelInputs) -> paddle.Tensor | None:
    """Run T tokens through all layers of the whole model.

    The ranks of one pipeline, and of one tensor group, call it with the same tokens. Ranks that share experts call it
    with tokens of their own, and when they have no more they call `finish_passes`.

    Returns:
        The hidden states behind the final norm [T, D] on the last stage; None on the others.
    """
    _num_active(model, 1)
    return _run(model, inputs)


@paddle.no_grad()
def finish_passes(model: RankModel) -> None:
    """Take part in the passes of the other ranks that share experts until all of them have called this. Every rank
    calls it once it has run its own passes; without expert parallelism it does nothing.
    """
    token = np.zeros(model.token_multiple, dtype=np.int64)
    while _num_active(model, 0):
        _run(model, packed_inputs(model, token, np.ones_like(token)))


def stage_input(model: RankModel, num_tokens: int) -> tuple[list[int], paddle.dtype]:
    """Shape and dtype of the hidden states that one stage sends to the next for `num_tokens` tokens."""
    return [num_tokens // model.token_multiple, model.config.hidden_size], model.residual_dtype


def _num_active(model: RankModel, active: int) -> int:
    """How many of the ranks that share experts are about to run a pass on tokens of their own."""
    group = model.mesh.expert_group
    return 0 if group.size == 1 else int(comm.sum_floats(np.array([active]), group)[0])


def _run(model: RankModel, inputs: ModelInputs) -> paddle.Tensor | None:
    mesh, stages = model.mesh, model.mesh.pipe_group
    x_TD: paddle.Tensor | None = None
    for number, layers in enumerate(model.chunks):
        if mesh.is_first_stage and number == 0:
            x_TD = model.model.embed(inputs)
        else:
            shape, dtype = stage_input(model, inputs.input_ids.shape[0])
            x_TD = comm.recv(shape, dtype, stages.ranks[(mesh.pipe - 1) % stages.size])
        x_TD, _ = model.model.run(x_TD, layers, inputs)
        if mesh.is_last_stage and number == len(model.chunks) - 1:
            assert model.model.norm is not None, "the last stage holds the final norm"
            return model.enter_head(model.model.norm(x_TD))
        comm.send(x_TD, stages.ranks[(mesh.pipe + 1) % stages.size])
    return None
