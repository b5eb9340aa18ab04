"""Runs the layers of this process on microbatches, and whole passes without gradients.

The pipeline's executor (parallel/pipeline.py) decides when each chunk runs; one process alone is a pipeline of one
stage.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice

import paddle

from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM, Routings
from erniekit.models.inputs import ModelInputs, batch_inputs, own_pictures, padded_length
from erniekit.models.picture_balance import PatchLoad, PicturePlan
from erniekit.models.stages import stage_input
from erniekit.nn.dropout import DropoutStep
from erniekit.nn.neftune import NoiseStep
from erniekit.parallel import pipeline
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.pipeline_schedule import forward_plan
from erniekit.utils import heartbeat
from erniekit.utils.spans import span


class ChunkRunner:
    """Runs the chunks of layers that this process holds (one, or several where the pipeline is interleaved) on a step's
    microbatches. The inputs of a microbatch are made for its first chunk, and dropped with its last. `patch_load`: how
    data ranks divide the patches of the pictures; None where each encodes its own.
    """

    def __init__(
        self,
        model: CausalLM,
        microbatches: Sequence[PackedBatch],
        noise: NoiseStep | None = None,
        dropout: DropoutStep | None = None,
    ) -> None:
        self.model, self.microbatches = model, microbatches
        self._noise, self._dropout = noise, dropout
        self._inputs: dict[int, ModelInputs] = {}
        self.patch_load: PatchLoad | None = None
        self._picture_plans: list[PicturePlan | None] = [None] * len(microbatches)
        if model.picture_ranks is not None:
            grids = [own_pictures(model, batch).grid for batch in microbatches]
            self._picture_plans, self.patch_load = model.picture_ranks.plan(grids)

    def run(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor, Routings, ModelInputs]:
        """The output of a chunk's layers, what their routers chose, and the inputs of the microbatch. The chunks of a
        microbatch come in order.

        Args:
            x_TD: the output of the chunk before; None for the first chunk of the model, which embeds the tokens.
        """
        decoder, inputs = self.model.model, self._inputs_of(chunk, microbatch)
        x_TD, routings = decoder.run(decoder.embed(inputs) if x_TD is None else x_TD, self.model.chunks[chunk], inputs)
        return x_TD, routings, inputs

    def _inputs_of(self, chunk: int, microbatch: int) -> ModelInputs:
        if microbatch not in self._inputs:
            batch = self.microbatches[microbatch]
            with span("inputs"):
                self._inputs[microbatch] = batch_inputs(
                    self.model,
                    batch,
                    noise=self._noise,
                    dropout=self._dropout,
                    picture_plan=self._picture_plans[microbatch],
                )
        is_last = chunk == len(self.model.chunks) - 1
        return self._inputs.pop(microbatch) if is_last else self._inputs[microbatch]

    def input_shape(self, microbatch: int) -> tuple[list[int], paddle.dtype]:
        """Shape and dtype of what a stage sends to the next."""
        return stage_input(self.model, padded_length(self.model, self.microbatches[microbatch]))

    def reaches_head(self, chunk: int) -> bool:
        """Whether the head comes after this chunk."""
        return self.model.shard.has_head and chunk == len(self.model.chunks) - 1


# Takes a microbatch's number, the last layer's output [T, D], and the inputs of the pass.
AtHead = Callable[[int, paddle.Tensor, ModelInputs], None]


class _ForwardStage:
    """A stage of the pipeline that hands the last layer's output to `at_head`."""

    def __init__(self, runner: ChunkRunner, at_head: AtHead) -> None:
        self._runner, self._at_head = runner, at_head

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        x_TD, _, inputs = self._runner.run(chunk, microbatch, x_TD)
        if not self._runner.reaches_head(chunk):
            return x_TD, None
        self._at_head(microbatch, x_TD, inputs)
        return None, None

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], paddle.dtype]:
        return self._runner.input_shape(microbatch)

    def after_backward(self, chunk: int, microbatch: int) -> None:
        raise AssertionError("a pass without gradients has no backward")


def final_norm(model: CausalLM, x_TD: paddle.Tensor) -> paddle.Tensor:
    """Applies the final norm to the last layer's output. Only the last stage has it."""
    assert model.model.norm is not None
    return model.model.norm(x_TD)


def forward_groups(mesh: Mesh, batches: Generator[PackedBatch, None, None]) -> Iterator[list[PackedBatch]]:
    """Microbatches, as many at a time as keep every pipeline stage busy. `batches` is closed at the end."""
    stages = mesh.degrees.pipeline
    with closing(batches):
        while group := list(islice(batches, 4 * stages if stages > 1 else 1)):
            yield group


def forward_pass(model: CausalLM, microbatches: Sequence[PackedBatch], at_head: AtHead) -> None:
    """Run microbatches through all stages of a model without gradients, in eval mode. Every rank has to call this at
    the same time.
    """
    heartbeat.waiting(None)  # data ranks communicate only at the end of an evaluation, which may take hours
    mesh, num_chunks = model.mesh, len(model.chunks)
    was_training = model.training
    model.eval()
    actions = forward_plan(mesh.degrees.pipeline, len(microbatches), num_chunks, mesh.blocking_sends)[mesh.pipe]
    stage = _ForwardStage(ChunkRunner(model, microbatches), at_head)
    pipeline.run(actions, stage, mesh.pipe_group.ranks)
    if was_training:
        model.train()
