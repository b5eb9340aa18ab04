"""How the parity tests run this package on a stored input: a dict of int arrays [B, S] as the fixtures hold them."""

import numpy as np
import paddle
from support.packed import packed
from support.whole_model import train_stage

from erniekit.config.schema import Config
from erniekit.data.packed_batch import IGNORE
from erniekit.models.decoder import CausalLM
from erniekit.training.recipes.causal import CausalRecipe

Item = dict[str, np.ndarray]


def logits_of(model: CausalLM, item: Item) -> paddle.Tensor:
    """[B, S, V], through the public call."""
    ids, positions, segments = (paddle.to_tensor(item[key]) for key in ("input_ids", "position_ids", "segment_ids"))
    return model(ids, position_ids=positions, segment_ids=segments)


def mean_cross_entropy(logits: paddle.Tensor, labels: np.ndarray) -> paddle.Tensor:
    """Paddle's cross-entropy of logits [B, S, V] and already shifted labels [B, S], over labels != -100.

    Not reduction="mean": with a negative ignore_index Paddle 3 divides by all positions, the ignored ones too.
    """
    flat = paddle.to_tensor(labels).flatten()
    total = paddle.nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORE, reduction="sum")
    return total / int((labels != IGNORE).sum())


def plain_loss(model: CausalLM, item: Item) -> paddle.Tensor:
    """Mean cross-entropy over the logits of the public call."""
    return mean_cross_entropy(logits_of(model, item), item["labels"])


def training_loss(model: CausalLM, item: Item, mtp_factor: float = 0.0) -> paddle.Tensor:
    """What a training step differentiates: padding dropped, head and loss fused and only where labels are.

    Router losses are off; multi-token prediction is off where its factor is 0.
    """
    config = Config(
        multi_token_pred_lambda=mtp_factor,
        moe_aux_loss_lambda=0.0,
        moe_z_loss_lambda=0.0,
        moe_orthogonal_loss_lambda=0.0,
    )
    recipe = CausalRecipe(config, model.config.num_nextn_predict_layers if mtp_factor else 0)
    batch = packed(item["input_ids"], item["labels"], item["position_ids"], item["segment_ids"])
    _, loss = train_stage(config, model, recipe, [batch]).forward(0, 0, None)
    assert loss is not None
    return loss
