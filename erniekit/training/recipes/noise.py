"""Noise on the input embeddings, for any recipe."""

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.models.decoder import CausalLM
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
