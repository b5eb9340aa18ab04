"""Scores on pairs of answers: which one a model prefers, and by how much."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import paddle

from erniekit import lora
from erniekit.build import PreparedModel, inference_options, prepare_model
from erniekit.checkpoint.model_dir import has_weights
from erniekit.checkpoint.model_shape import model_config
from erniekit.config import Config
from erniekit.data.batch import PackedBatch
from erniekit.data.loader import Loader
from erniekit.generation.load import FoundModel, Opened
from erniekit.hub import resolve_model
from erniekit.losses.preference import options_of, pair_metrics, preference_loss, sft_ratio_of, wants_reference
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs
from erniekit.models.scoring import pair_log_probs
from erniekit.utils import log
from erniekit.utils.errors import DataError


@dataclass(frozen=True)
class PairScores:
    """Of N pairs, chosen and rejected answer in rows: `log_probs` and `lengths` fp32 [2, N]; `score_deltas` [N]."""

    log_probs: np.ndarray
    lengths: np.ndarray
    score_deltas: np.ndarray


def score_pairs(
    cfg: Config, opened: Opened, loader: Loader, reference_model: PreparedModel | None = None
) -> dict[str, Any]:
    """The loss that `cfg` asks for and the means of losses.preference.pair_metrics over the evaluation data (at most
    max_evaluate_steps batches).

    The reference is the model without its adapter, or `reference_model` (see `find_reference`); otherwise there is
    none, and a line says so.
    """
    most = cfg.loss_subbatch_seqlen
    policy_scores = _score(opened.model, _batches(cfg, loader), most)
    found = None
    with _reference(cfg, opened, reference_model) as reference:
        if reference is not None:
            found = _score(reference, _batches(cfg, loader), most).log_probs
    own = [paddle.to_tensor(side) for side in policy_scores.log_probs]
    other = [None, None] if found is None else [paddle.to_tensor(side) for side in found]
    lengths = [paddle.to_tensor(side) for side in policy_scores.lengths]
    loss, *rewards = preference_loss(
        *own,
        *other,
        **(options_of(cfg) | {"reference_free": found is None}),
        pref_loss_ratio=cfg.pref_loss_ratio,
        sft_loss_ratio=sft_ratio_of(cfg),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        score_deltas=paddle.to_tensor(policy_scores.score_deltas),
    )
    metrics = {"loss": loss} | pair_metrics((own[0], own[1]), (rewards[0], rewards[1]), cfg.beta)
    if found is None:
        del metrics["kl"]  # from what?
    counts = {"num_samples": len(policy_scores.score_deltas), "num_dropped": loader.report()["dropped"]}
    return counts | {name: float(value.mean()) for name, value in metrics.items()}


def find_reference(cfg: Config, model: FoundModel) -> PreparedModel | None:
    """The model that `model_name_or_path` names, checked but not read, as the reference for another one; None where the
    loss wants none, or there is no other.
    """
    if not wants_reference(cfg) or cfg.model_name_or_path is None or model.prepared.options.adapter is not None:
        return None
    base = resolve_model(cfg.model_name_or_path, cfg.download_hub)
    if base.resolve() == model.path.resolve():
        return None
    random_start = not cfg.continue_training
    if not random_start and not has_weights(base):
        return None
    shape = model_config(cfg, base) if random_start else None
    return prepare_model(base, inference_options(cfg, random_start=random_start), shape)


@contextmanager
def _reference(cfg: Config, opened: Opened, reference_model: PreparedModel | None) -> Iterator[CausalLM | None]:
    """The model to compare with; None where the loss wants none or there is none."""
    if not wants_reference(cfg):
        yield None
    elif lora.state_of(opened.model) is not None:
        log.info("reference: the model without its adapter")
        with lora.disabled(opened.model):
            yield opened.model
    elif reference_model is not None:
        log.info(f"reference: {reference_model.path}")
        yield reference_model.build()
    else:
        log.warning(
            "no reference: model_name_or_path names no other model with weights, so rewards are beta times the "
            "log-probabilities alone"
        )
        yield None


def _batches(cfg: Config, loader: Loader) -> Iterator[PackedBatch]:
    with closing(loader.batches()) as batches:
        yield from islice(batches, cfg.max_evaluate_steps if cfg.max_evaluate_steps > 0 else None)


@paddle.no_grad()
def _score(model: CausalLM, batches: Iterable[PackedBatch], most: int) -> PairScores:
    parts = [_score_batch(model, batch, most) for batch in batches if len(batch.pairs)]
    if not parts:
        raise DataError("eval_dataset_path: no pair of answers is left to evaluate. Hint: raise max_seq_len.")
    joined = (np.concatenate(values, axis=-1) for values in zip(*(vars(part).values() for part in parts), strict=True))
    return PairScores(*joined)


def _score_batch(model: CausalLM, batch: PackedBatch, most: int) -> PairScores:
    hidden = model.model(batch_inputs(model, batch)).normed
    log_probs, lengths = pair_log_probs(model, hidden, batch, most).numpy(), batch.answer_labels
    return PairScores(log_probs.reshape([2, -1]), lengths.reshape([2, -1]), batch.pairs.score_deltas)
