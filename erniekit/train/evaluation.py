"""Scores on the evaluation data while training, over every rank's share of model and data."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.scoring import Score, score_hidden
from erniekit.parallel import comm, pipeline
from erniekit.parallel.schedule import forward_plan
from erniekit.train.build import Run
from erniekit.train.flat import FlatBatch, flatten
from erniekit.train.stage import input_shape, run_chunk
from erniekit.utils.errors import TrainError


class ScoreStage:
    """Runs this process's chunks without gradients; the last stage adds up the `score`."""

    def __init__(self, model: CausalLM, chunks: Sequence[Sequence[int]], microbatches: Sequence[FlatBatch]) -> None:
        self.model, self.chunks, self.microbatches = model, chunks, microbatches
        self.score = Score()

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(output for the next stage, or None from the last; no loss)."""
        batch = self.microbatches[microbatch]
        x_TD, _, _ = run_chunk(self.model, self.chunks[chunk], batch, x_TD)
        if not (self.model.part.has_head and chunk == len(self.chunks) - 1):
            return x_TD, None
        hidden = self.model.enter_head(self.model.model.norm(x_TD))
        if len(batch.supervised):
            self.score += score_hidden(self.model, hidden, batch.supervised, batch.labels)
        return None, None

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], str]:
        """Shape and dtype of what the stage before sends."""
        return input_shape(self.model, self.microbatches[microbatch])

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Nothing goes backward here."""


def evaluate(run: Run) -> dict[str, float]:
    """Loss, perplexity and token accuracy over the evaluation data (at most max_evaluate_steps batches a rank)."""
    assert run.eval_loader is not None
    mesh, most = run.mesh, run.cfg.max_evaluate_steps
    stages = mesh.degrees.pipeline
    score = Score()
    run.model.eval()
    with closing(run.eval_loader.batches()) as batches:
        limited = islice(batches, most if most > 0 else None)
        while taken := [
            flatten(batch, run.token_multiple) for batch in islice(limited, 4 * stages if stages > 1 else 1)
        ]:
            stage = ScoreStage(run.model, run.chunks, taken)
            actions = forward_plan(stages, len(taken), len(run.chunks))[mesh.pipe]
            pipeline.run(actions, stage, mesh.pipe_group.ranks)
            score += stage.score
    run.model.train()
    over_stages = comm.sum_floats(np.array(score, np.float64), mesh.pipe_group)
    sum_nll, num_tokens, num_correct = comm.sum_floats(over_stages, mesh.data_group).tolist()
    if not num_tokens:
        raise TrainError("eval_dataset_path: no token of the evaluation data carries loss")
    metrics = Score(sum_nll, int(num_tokens), int(num_correct)).metrics()
    return {f"eval_{name}": value for name, value in metrics.items()}
