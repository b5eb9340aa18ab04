"""Compares the keys that name modules of the model, or ask for what some modules cannot have, with the model."""

import dataclasses
from pathlib import Path

from erniekit import build, hub
from erniekit.checkpoint.model_dir import has_weights
from erniekit.checkpoint.model_shape import vision_start
from erniekit.config import Config
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.models.config import ModelConfig
from erniekit.models.pipeline_layout import assign_layers
from erniekit.parallel.mesh import Mesh, ParallelDims
from erniekit.quantize.trained import check_export
from erniekit.training.freezing import check_frozen
from erniekit.training.methods import method_of
from erniekit.utils import log
from erniekit.utils.errors import UserError


def check(cfg: Config, directory: Path, tokenizer: Path, model_config: ModelConfig, degrees: ParallelDims) -> set[str]:
    """The frozen parameters. Raises the UserError of a training with this configuration, where adapters, frozen parts,
    quantisation or a teacher do not fit the model in `directory`, which is `model_config` when it is trained. No weight
    is read.
    """
    with log.captured() as lines:  # the other sections say what these say
        frozen = _check(cfg, directory, tokenizer, model_config, degrees)
    for is_warning, text in lines:
        if is_warning:
            log.warning(text)
    return frozen


def _check(cfg: Config, directory: Path, tokenizer: Path, model_config: ModelConfig, degrees: ParallelDims) -> set[str]:
    starts_at_random = not cfg.continue_training or not has_weights(directory)
    options = dataclasses.replace(
        build.training_options(cfg, "cpu"),
        random_start=starts_at_random,
        vision_start=None if starts_at_random else vision_start(cfg, model_config),
    )
    prepared = build.prepare_model(directory, options, model_config if starts_at_random else None)
    frozen = check_frozen(cfg, prepared.config, prepared.adapter)
    check_export(cfg.qat, prepared.config, cfg.quantization_group_size)
    for stage, chunks in enumerate(assign_layers(cfg, prepared.config, degrees.pipeline)):
        mesh = Mesh.outline(degrees, stage * degrees.data * degrees.tensor)
        build.outline(prepared.config, options, mesh, chunks, prepared.adapter)
    if not _must_be_downloaded(cfg.teacher_model_name_or_path):
        method_of(cfg).check(cfg, prepared, load_tokenizer(tokenizer), degrees)
    return frozen


def _must_be_downloaded(model: str | None) -> bool:
    """Whether the run downloads a model, which is not looked into before that."""
    try:
        return model is not None and hub.find_model(model) is None
    except UserError:
        return False  # the run says what is wrong with the name
