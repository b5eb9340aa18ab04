"""Adapters with random factors: freshly attached ones contribute nothing, so that a lost factor would go unnoticed."""

from typing import Any

import numpy as np

from erniekit import lora
from erniekit.models.decoder import CausalLM


def randomize(model: CausalLM) -> None:
    """Add noise to every trainable parameter."""
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            noise = rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(0.2)
            parameter.set_value(parameter.numpy() + noise)


def attach_random(model: CausalLM, **options: Any) -> CausalLM:
    """Attach a random adapter to a model whose head is tied to its embeddings; returns the model."""
    lora.attach(model, lora.LoraOptions(**{"rank": 3, "alpha": 4.0} | options), tied=True)
    randomize(model)
    return model
