"""The public functions of the root package, such as `erniekit.load_model`."""

import types
from typing import Any

from erniekit import build, config
from erniekit.checkpoint.model_io import save_model
from erniekit.cli import launch
from erniekit.data.vision.processor import load_processor
from erniekit.serve.llm import LLM
from erniekit.serve.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams", "load_model", "load_processor", "save_model", "train"]


def load_model(path: str, dtype: str = "float32", adapter: str | None = None) -> Any:
    """Load an ERNIE 4.5 model for inference.

    Args:
        path: a directory with config.json and safetensors weights, in the Hugging Face ("-PT") or the Paddle
            ("-Paddle") layout, sharded or not, tied or not, also quantised (docs/quantisation.md).
        dtype: the type of the parameters, "float32", "bfloat16" or "float16" (the router stays in float32).
        adapter: a directory with a LoRA adapter to apply on top.

    Returns:
        A `paddle.nn.Layer` in eval mode: `model(input_ids, position_ids=None, segment_ids=None)` maps int64 ids
        [batch, seq] to logits [batch, seq, vocab], and one that sees pictures takes what `load_processor` gives;
        `model.generate(...)` continues a prompt (see erniekit/generation/generate.py).

    Raises:
        CheckpointError: the directory is not a model, or tensors are missing, unexpected or misshapen.
    """
    from erniekit.generation import generate

    model = build.load_model(path, dtype=dtype, adapter=adapter)
    # `generation` is a layer above `models`, so the model class cannot define this method itself.
    model.generate = types.MethodType(generate.generate, model)
    return model


def train(yaml_path: str, **overrides: Any) -> Any:
    """Train as `erniekit train yaml_path key=value ...` does, in this process.

    Args:
        yaml_path: the configuration file.
        overrides: configuration keys that replace those of the file.

    Returns:
        The result of the run, with the history of its metrics (see erniekit/training/run.py). The log names what has no
        effect in the configuration, as the command does.

    Raises:
        ConfigError: a key is unknown, has the wrong type, or requests what this version does not support.
        UserError: anything else that the user can fix (data, checkpoint, disk).
    """
    cfg = config.load(yaml_path, overrides, command="train")
    launch.log_notes(cfg)
    launch.check(cfg, "train")
    from erniekit.training import run  # imported late, since loading and saving a model do not need the trainer

    return run.train(cfg)
