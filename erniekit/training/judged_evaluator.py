"""The evaluator of methods that train on judged answers (KTO)."""

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.loader import Loader
from erniekit.parallel import comm
from erniekit.training.evaluators import EvaluatedModel, Scores, batch_groups
from erniekit.training.recipes.kto import divergence, judged_losses
from erniekit.training.reference import PairScorer
from erniekit.utils.errors import DataError


def judged_scores(evaluated: EvaluatedModel, loader: Loader) -> Scores:
    """The KTO loss over all judged answers together, kl, the mean implicit rewards of good and of bad answers where
    there are such, their difference "margin", and "accuracy", the share of answers whose implicit reward is on the side
    of the judgement (above kl for good ones). How answers are batched and divided over ranks changes nothing.

    Without a reference its log-probabilities count as 0. All batches are kept until the end, because the divergence
    pairs each prompt with another document's answer.
    """
    cfg, model, reference = evaluated.cfg, evaluated.model, evaluated.reference
    mesh, scorer = evaluated.mesh, PairScorer(cfg.loss_subbatch_seqlen)
    batches = [batch for group in batch_groups(evaluated, loader) for batch in group]
    kl = divergence(cfg, model, scorer, reference, batches) if cfg.kto_loss_type == "kto" else 0.0
    columns: list[list[list[float]]] = []
    of_references = [0.0] * len(batches) if reference is None else reference.log_probs(batches)
    for batch, of_policy, of_reference in zip(batches, scorer.log_probs(model, batches), of_references, strict=True):
        if len(batch.judged) and mesh.holds_results:
            ratios = (of_policy - of_reference).tolist()
            columns.append([ratios, batch.judged.is_good.tolist(), [kl] * len(ratios)])
    gathered = [table for of_rank in comm.gather_objects(columns, mesh.world_group) for table in of_rank]
    if not gathered:
        raise DataError("eval_dataset_path: no judged answer is left to evaluate. Hint: raise max_seq_len.")
    ratios, is_good, kls = (np.concatenate([np.array(x) for x in column]) for column in zip(*gathered, strict=True))
    is_good = is_good.astype(bool)
    return Scores(_metrics(cfg, ratios, is_good, float(kls[0])), {"num_samples": len(ratios)})


def _metrics(cfg: Config, ratios: np.ndarray, is_good: np.ndarray, kl: float) -> dict[str, float]:
    losses = judged_losses(cfg, paddle.to_tensor(ratios.astype(np.float32)), paddle.to_tensor(is_good), kl)
    rewards = cfg.beta * ratios
    metrics = {
        "loss": float(losses.mean()),
        "accuracy": float((((ratios - kl) > 0) == is_good).mean()),
    }
    if cfg.kto_loss_type == "kto":  # the other loss does not estimate it
        metrics["kl"] = kl
    for name, chosen in (("reward_good", is_good), ("reward_bad", ~is_good)):
        if chosen.any():
            metrics[name] = float(rewards[chosen].mean())
    if is_good.any() and not is_good.all():
        metrics["margin"] = metrics["reward_good"] - metrics["reward_bad"]
    return metrics
