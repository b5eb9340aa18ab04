"""The evaluators of the methods, which evaluations during training and `erniekit eval` share.

An evaluator takes a model, in one process or divided over many, and its evaluation data, and returns Scores. Every rank
runs it at the same time and gets the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.loader import Loader
from erniekit.data.packed_batch import Modality, PackedBatch
from erniekit.losses.preference import options_of, pair_metrics, preference_loss, sft_ratio_of
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import LARGEST_EXPONENT, Score, score_hidden
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_pass import final_norm, forward_groups, forward_pass
from erniekit.training.reference import PairScorer, Reference
from erniekit.utils import log
from erniekit.utils.errors import DataError, EvaluationError
from erniekit.utils.wording import count_of


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, or this process's shard of it.

    name: its name in messages. reference: the model that it is compared with, or None.
    """

    name: str
    cfg: Config
    model: CausalLM
    reference: Reference | None = None

    @property
    def mesh(self) -> Mesh:
        """The ranks that share the model and the data."""
        return self.model.mesh


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation. metrics: "loss" and the method's others. counts: "num_samples", and
    "num_tokens" if known.
    """

    metrics: dict[str, float]
    counts: dict[str, int]


class EvaluationData(Protocol):
    """Evaluation data, of the kind that the method's evaluator takes: a Loader, or for stage RL prompts."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def report(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


Evaluator = Callable[[EvaluatedModel, Any], Scores]  # the second argument is the method's EvaluationData


def score(evaluator: Evaluator, evaluated: EvaluatedModel, data: EvaluationData, cure: str) -> Scores:
    """Run an evaluator over the evaluation data: all of them, or the first max_evaluate_steps batches. Samples that are
    cut are counted in a warning, the first time.

    Raises:
        DataError: the data hold nothing to evaluate on.
        EvaluationError: a metric is not finite; `cure` is what the user can do about it.
    """
    scores = evaluator(evaluated, data)
    for name, value in scores.metrics.items():
        if not math.isfinite(value):
            raise EvaluationError(
                f"{evaluated.name}: the {name} on the evaluation data is {value}: the weights are not finite, or too "
                f"large. {cure}"
            )
    if num_cut := data.report().get("cut"):
        log.once(
            f"eval data: {count_of(num_cut, 'sample')} cut at max_seq_len: {evaluated.cfg.max_seq_len}, so that a "
            "part was not read (see truncation). Raise max_seq_len"
        )
    return scores


def batch_groups(evaluated: EvaluatedModel, loader: Loader) -> Iterator[list[PackedBatch]]:
    """The evaluation batches, as many at a time as keep every pipeline stage busy."""
    return forward_groups(evaluated.mesh, loader.batches(evaluated.cfg.max_evaluate_steps))


def label_scores(evaluated: EvaluatedModel, loader: Loader) -> Scores:
    """Loss (nats a token), perplexity and accuracy of the labels. Methods with pictures also have "loss_text",
    "loss_image" and "loss_video", as in training: the losses of the labels in documents of text alone, with images, and
    with videos, each where there are such documents.
    """
    model, mesh = evaluated.model, evaluated.mesh
    of_modality, num_samples = [Score() for _ in Modality], 0

    def add(batches: Sequence[PackedBatch], number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
        hidden_TD, batch = model.enter_head(final_norm(model, x_TD)), batches[number]
        for modality in Modality:
            places = batch.supervised[batch.supervised_modality == modality]
            mask, rows = inputs.select(places)
            of_modality[modality] += score_hidden(model, hidden_TD, rows, batch.labels[places[mask]])

    for microbatches in batch_groups(evaluated, loader):
        # The samples of a row count once, on the first of the ranks that share it.
        num_samples += sum(batch.num_samples for batch in microbatches) if mesh.context_group.index == 0 else 0
        forward_pass(model, microbatches, partial(add, microbatches))
    of_all_stages = comm.sum_floats(np.array(of_modality, np.float64).reshape(-1), mesh.pipe_group)
    *sums, num_samples = comm.sum_floats(np.array([*of_all_stages, num_samples], np.float64), mesh.data_group).tolist()
    rows = np.reshape(sums, [len(Modality), -1]).tolist()
    of_modality = [Score(sum_nll, int(tokens), int(correct)) for sum_nll, tokens, correct in rows]
    score = sum(of_modality, Score())
    if not score.num_tokens:
        raise DataError(
            "eval_dataset_path: no token of the evaluation data carries loss. "
            "Give samples with answers (label 1), or raise max_seq_len."
        )
    metrics = score.metrics()
    if metrics["loss"] > LARGEST_EXPONENT:
        log.warning(f"perplexity: exp({metrics['loss']:.1f}) has no float; exp({LARGEST_EXPONENT:.0f}) is reported")
    if evaluated.cfg.method.vision:
        metrics |= {
            f"loss_{modality.name.lower()}": of_modality[modality].metrics()["loss"]
            for modality in Modality
            if of_modality[modality].num_tokens
        }
    return Scores(metrics, {"num_samples": int(num_samples), "num_tokens": score.num_tokens})


@dataclass(frozen=True)
class _PairTable:
    """What the loss of N pairs is computed from, fp32: the policy's and the reference's log-probabilities and the
    lengths of the chosen and the rejected answers [2, N], and the differences of their scores [N].
    """

    policy: np.ndarray
    reference: np.ndarray
    lengths: np.ndarray
    score_deltas: np.ndarray


def pair_scores(evaluated: EvaluatedModel, loader: Loader) -> Scores:
    """The preference loss that the configuration asks for, and the means of losses.preference.pair_metrics.

    The loss is computed from all pairs together, because some losses contain means over them: how the pairs are batched
    and divided over ranks changes nothing. Without a reference its log-probabilities count as 0.
    """
    cfg, has_reference = evaluated.cfg, evaluated.reference is not None
    table = _table_of_all_ranks(evaluated, loader)
    policy, reference, lengths, score_deltas = (paddle.to_tensor(array) for array in vars(table).values())
    loss, *rewards = preference_loss(
        *policy,
        *(reference if has_reference else (None, None)),
        **(options_of(cfg) | {"reference_free": not has_reference}),
        pref_loss_ratio=cfg.pref_loss_ratio,
        sft_loss_ratio=sft_ratio_of(cfg),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        score_deltas=score_deltas,
    )
    metrics = {"loss": loss} | pair_metrics((policy[0], policy[1]), (rewards[0], rewards[1]), cfg.beta)
    if not has_reference:
        del metrics["kl"]  # without a reference there is no divergence from it
    return Scores({name: float(value.mean()) for name, value in metrics.items()}, {"num_samples": len(score_deltas)})


def _table_of_all_ranks(evaluated: EvaluatedModel, loader: Loader) -> _PairTable:
    """The pairs of all data ranks, on every rank. DataError if there are none."""
    mesh, reference = evaluated.mesh, evaluated.reference
    scorer = PairScorer(evaluated.cfg.loss_subbatch_seqlen)
    tables: list[_PairTable] = []
    for microbatches in batch_groups(evaluated, loader):
        policy = scorer.log_probs(evaluated.model, microbatches)
        other = policy if reference is None else reference.log_probs(microbatches)
        for batch, of_policy, of_reference in zip(microbatches, policy, other, strict=True):
            if len(batch.pairs):
                lengths = batch.answer_labels.reshape([2, -1])
                tables.append(_PairTable(of_policy.numpy(), of_reference.numpy(), lengths, batch.pairs.score_deltas))
    columns = [[column.tolist() for column in vars(table).values()] for table in tables if mesh.holds_results]
    gathered = [table for of_rank in comm.gather_objects(columns, mesh.world_group) for table in of_rank]
    if not gathered:
        raise DataError("eval_dataset_path: no pair of answers is left to evaluate. Hint: raise max_seq_len.")
    return _PairTable(
        *(np.concatenate([np.array(x, np.float32) for x in column], axis=-1) for column in zip(*gathered, strict=True))
    )
