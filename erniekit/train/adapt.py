"""What of a model a run trains and saves: all weights, or adapters beside frozen ones (fine_tuning: LoRA)."""

from pathlib import Path

import numpy as np

from erniekit import lora
from erniekit.checkpoint.adapter import fingerprint
from erniekit.checkpoint.adapter_io import attach_stored, load_adapter, save_adapter
from erniekit.checkpoint.folder import copy_companions
from erniekit.checkpoint.model_io import load_weights, save_model
from erniekit.config.schema import Config
from erniekit.lora.targets import DEFAULT_TARGETS, split_targets
from erniekit.models.config import Format
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import our_shapes
from erniekit.utils import log


def lora_options(cfg: Config) -> lora.LoraOptions:
    """What the configuration's LoRA keys say."""
    alpha = cfg.lora_alpha
    if alpha < 0:
        alpha = 4.0 if cfg.rslora else 2.0 * cfg.lora_rank
    return lora.LoraOptions(
        rank=cfg.lora_rank,
        alpha=alpha,
        dropout=cfg.lora_dropout,
        rslora=cfg.rslora,
        dora=cfg.use_dora,
        targets=split_targets(cfg.lora_target_modules or "") or DEFAULT_TARGETS,
        modules_to_save=split_targets(cfg.modules_to_save or ""),
        seed=cfg.seed,
    )


def attach_lora(model: CausalLM, cfg: Config, model_dir: Path) -> None:
    """Hang on a model with its weights (those of `model_dir`) the adapter of `lora_path`, or new ones."""
    if cfg.lora_path:
        state = attach_stored(model, cfg.lora_path, model_dir, dropout=cfg.lora_dropout)
        log.info(f"lora_path: {cfg.lora_path}: rank, scaling and targets are those of this adapter")
        start = "goes on from lora_path"
    else:
        config = model.config
        state = lora.attach(
            model, lora_options(cfg), our_shapes(config), config.tie_word_embeddings, share=model.part.share
        )
        start = "new"
    state.base, state.base_fingerprint = cfg.model_name_or_path, fingerprint(model_dir)
    sizes = [int(np.prod(p.shape)) for p in model.parameters()]
    trained = sum(int(np.prod(p.shape)) for p in model.parameters() if not p.stop_gradient)
    log.info(
        f"LoRA ({start}): {lora.describe(state)}; {trained:,} of {sum(sizes):,} parameters are trained "
        f"({trained / sum(sizes):.2%})"
    )


def load_trained(model: CausalLM, directory: Path) -> None:
    """Set what a run trains to what its checkpoint holds."""
    if lora.state_of(model) is None:
        load_weights(model, directory)
    else:
        load_adapter(model, directory)


def save_trained(model: CausalLM, directory: Path, format: Format, model_dir: Path) -> None:
    """Weights in `format`, config.json and tokenizer files: a directory that other tools load as it is; or the adapter
    in PEFT's format.
    """
    if lora.state_of(model) is None:
        save_model(model, directory, format)
        copy_companions(model_dir, directory)
    else:
        save_adapter(model, directory)
