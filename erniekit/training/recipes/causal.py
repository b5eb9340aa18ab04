"""Next-token training, for supervised fine-tuning and pretraining, which differ only in their data."""

from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.packed_batch import IGNORE, Modality, PackedBatch
from erniekit.losses.lm import linear_cross_entropy
from erniekit.models.decoder import CausalLM, Hidden
from erniekit.models.inputs import ModelInputs
from erniekit.models.mtp import predict_ahead
from erniekit.nn.attention_mask import next_in_document
from erniekit.nn.narrow import gather
from erniekit.training.forward_pass import final_norm
from erniekit.training.recipes.base import Recipe, RecipeContext, Term


@dataclass(frozen=True)
class CausalRecipe(Recipe):
    """Cross-entropy of the next token, multi-token prediction.

    `token_balance_loss` keeps samples with little supervised text from dominating. "sample": each sample's loss is
    divided by all its tokens and samples are averaged, (1/N) sum_i sum_t nll_it / length_i (ERNIE 4.5 technical report,
    "multimodal token-balanced loss"). "row": the gradient is that of the sum over max_seq_len of each row, full or not,
    and the reported loss stays the mean over supervised tokens, as in ERNIE's training code. "none": every supervised
    token of the step weighs the same.
    """

    cfg: Config
    mtp_depths: int
    by_modality: bool = False

    @classmethod
    def build(cls, context: RecipeContext) -> "CausalRecipe":
        """The recipe of a run."""
        return cls(context.cfg, context.cfg.mtp_depths, context.cfg.method.vision)

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Supervised tokens (or samples that have some), all tokens, and the labels that each MTP depth predicts."""
        supervised = batch.supervised
        if self.cfg.token_balance_loss == "sample":
            lm = float(len(np.unique(batch.segment_ids[supervised])))
        else:
            lm = float(len(supervised))
        counts = {"lm": lm, "tokens": float(batch.num_tokens)}
        if self.cfg.token_balance_loss == "row":
            counts["row_capacity"] = float(self.cfg.max_seq_len * len(batch.row_lengths))
        for depth in range(self.mtp_depths):
            counts[f"mtp_{depth}"] = float((_labels_ahead(batch, depth) != IGNORE).sum())
        if self.by_modality:
            kinds = batch.supervised_modality
            counts |= {f"loss_{m.name.lower()}": float((kinds == m).sum()) for m in Modality}
        return counts

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """Terms "lm", and if asked for "head_z" and "mtp_d"."""
        hidden = Hidden(x_TD, final_norm(model, x_TD))
        terms = self._lm_terms(model, hidden.normed, inputs, batch)
        return terms | self._mtp_terms(model, hidden, inputs, batch) if self.mtp_depths else terms

    def _lm_terms(
        self, model: CausalLM, normed_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The next-token loss, and the head's z-loss if asked for. One node gives both gradients; the second term
        carries its value alone.
        """
        total, z_sum, losses_T = self._cross_entropy(
            model, normed_TD, inputs, batch, batch.supervised, batch.labels, self.cfg.z_loss_lambda
        )
        kinds = batch.supervised_modality[inputs.select(batch.supervised)[0]] if self.by_modality else None
        terms = {} if kinds is None else self._of_modalities(kinds, losses_T)
        gradient_divisor = "row_capacity" if self.cfg.token_balance_loss == "row" else None
        if not self.cfg.z_loss_lambda:
            return {"lm": Term(total, "lm", gradient_divisor=gradient_divisor)} | terms
        value = z_sum.detach()
        return {
            "lm": Term(total - self.cfg.z_loss_lambda * value, "lm", gradient_divisor=gradient_divisor),
            "head_z": Term(value, "lm", self.cfg.z_loss_lambda),
        } | terms

    @staticmethod
    def _of_modalities(kinds: np.ndarray, losses_T: paddle.Tensor) -> dict[str, Term]:
        """Metrics "loss_text", "loss_image" and "loss_video": the mean -log p of the labels in documents of text alone,
        with images, and with videos. `kinds`: the modality of each label's document.
        """
        kinds = kinds if len(kinds) else np.full(1, -1)  # the head ran on one token that weighs nothing
        of_modality = np.stack([kinds == modality for modality in Modality]).astype(np.float32)
        sums = paddle.mv(paddle.to_tensor(of_modality), losses_T)
        names = [f"loss_{modality.name.lower()}" for modality in Modality]
        return {name: Term(sums[i], name, None) for i, name in enumerate(names)}

    def _cross_entropy(
        self,
        model: CausalLM,
        normed_TD: paddle.Tensor,
        inputs: ModelInputs,
        batch: PackedBatch,
        places: np.ndarray,
        labels_T: np.ndarray,
        z_weight: float = 0.0,
    ) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """Weighted sums over the token numbers `places` of -log p + z_weight * z^2, and of z^2; and each -log p. The
        head runs there only. Context ranks sum over their own tokens.
        """
        mask, own_rows = inputs.select(places)
        places = places[mask]
        weights, labels_of_places = np.ones(len(places), dtype=np.float32), labels_T[places]
        if self.cfg.token_balance_loss == "sample":
            weights /= batch.segment_lengths[batch.segment_ids[places]]
        if len(places) == 0:
            # Nothing to learn here. The head still runs, on one token that weighs nothing: ranks whose graphs differ
            # would complete their gradients, and so start their collectives, in different orders.
            own_rows, weights, labels_of_places = np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int64)
        normed_TD = model.enter_head(normed_TD)
        rows = normed_TD if len(own_rows) == normed_TD.shape[0] else gather(normed_TD, paddle.to_tensor(own_rows))
        labels, weights_T = paddle.to_tensor(labels_of_places), paddle.to_tensor(weights)
        loss, losses_T, z_squared_T = linear_cross_entropy(
            rows, model.output_head(), labels, weights_T, self.cfg.loss_subbatch_seqlen, z_weight
        )
        return loss, (z_squared_T * weights_T).sum(), losses_T

    def _mtp_terms(self, model: CausalLM, hidden: Hidden, inputs: ModelInputs, batch: PackedBatch) -> dict[str, Term]:
        terms = {}
        for number, normed_TD in enumerate(predict_ahead(model.model, hidden, inputs)):
            labels = _labels_ahead(batch, number)
            places = np.flatnonzero(labels != IGNORE)
            total, _, _ = self._cross_entropy(model, normed_TD, inputs, batch, places, labels)
            weight = self.cfg.multi_token_pred_lambda / self.mtp_depths
            terms[f"mtp_{number}"] = Term(total, f"mtp_{number}", weight)
        return terms


def _labels_ahead(batch: PackedBatch, depth: int) -> np.ndarray:
    """What a depth of multi-token prediction predicts from each token [T]: the label of the token 1 + depth places on,
    or IGNORE where that lies in another segment.
    """
    target, valid = next_in_document(batch.segment_ids, 1 + depth)
    return np.where(valid, batch.labels[target], IGNORE)
