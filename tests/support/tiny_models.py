"""Small models with random weights for tests of what is built on top of the decoder."""

import paddle

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from support.tiny_sizes import KINDS


def tiny_model(kind: str = "dense", seed: int = 3, **changes: object) -> CausalLM:
    """A dense or sparse model of two layers; `changes` are keys of config.json."""
    paddle.seed(seed)
    model = CausalLM(ModelConfig.from_dict(KINDS[kind] | changes))
    model.eval()
    return model
