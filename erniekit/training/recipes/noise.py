"""What training adds at random, for any recipe: noise on the input embeddings, dropout of attention weights."""

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.models.decoder import CausalLM
from erniekit.nn.dropout import DropoutStep
from erniekit.training.flat import FlatBatch


def neftune(cfg: Config, model: CausalLM, batch: FlatBatch) -> paddle.Tensor | None:
    """NEFTune: uniform noise in [-1, 1] * alpha / sqrt(length * D) on each document's embeddings [T, D] (Jain et al.
    2023, arXiv 2310.05914, algorithm 1). None unless asked for.
    """
    if not cfg.neftune:
        return None
    size = model.config.hidden_size
    scale = cfg.neftune_noise_alpha / np.sqrt(batch.document_lengths() * size)
    noise = paddle.uniform([batch.size, size], min=-1.0, max=1.0)
    return noise * paddle.to_tensor(scale.astype(np.float32)).unsqueeze(-1)


def attention_dropout(cfg: Config, step: int) -> DropoutStep | None:
    """The attention dropout of optimizer step `step` (from 0), which grows over dropout_warmup_steps. None without."""
    grown = min(1.0, step / cfg.dropout_warmup_steps) if cfg.dropout_warmup_steps else 1.0
    rate = cfg.attention_probs_dropout_prob * grown
    return DropoutStep(rate, cfg.seed, step) if rate else None
