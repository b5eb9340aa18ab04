"""Opens the reference with which a model is compared: the policy before training."""

from pathlib import Path

import paddle

from erniekit import lora
from erniekit.build import PreparedModel, inference_options, prepare_model
from erniekit.checkpoint.model_dir import has_weights, require_adapter
from erniekit.checkpoint.model_shape import model_config
from erniekit.checkpoint.peft_attach import load_adapter
from erniekit.config import Config
from erniekit.generation.load import PreparedChatModel
from erniekit.hub import resolve_model
from erniekit.models.decoder import CausalLM
from erniekit.training.methods import method_of
from erniekit.training.reference import AdapterReference, PairScorer, Reference, SecondModel, adapter_values
from erniekit.utils import log


def find_reference(cfg: Config, model: PreparedChatModel) -> PreparedModel | None:
    """The model that `model_name_or_path` names, checked but not read, as the reference for another one; None where the
    loss wants none, or there is no other.
    """
    if not method_of(cfg).wants_reference(cfg):
        return None
    if model.prepared.options.adapter is not None:
        if cfg.lora_path:
            require_adapter(cfg.lora_path)
        return None
    if cfg.model_name_or_path is None:
        return None
    base = resolve_model(cfg.model_name_or_path, cfg.download_hub)
    if base.resolve() == model.path.resolve():
        return None
    random_start = not cfg.continue_training
    if not random_start and not has_weights(base):
        return None
    shape = model_config(cfg, base) if random_start else None
    return prepare_model(base, inference_options(cfg, random_start=random_start), shape)


def open_reference(
    cfg: Config, model: CausalLM, path: Path, found: PreparedModel | None, scorer: PairScorer
) -> Reference | None:
    """What the loss compares `model`, of directory `path`, with: the model with the adapter that its training began
    with, or without an adapter, or `found` (see `find_reference`). Where the loss wants a reference and there is none,
    a warning says so.
    """
    if not method_of(cfg).wants_reference(cfg):
        return None
    if lora.state_of(model) is not None:
        return AdapterReference(model, scorer, _start_of_adapter(cfg, model, path))
    if found is not None:
        log.info(f"reference: {found.path}{_of_the_beginning(cfg)}")
        return SecondModel(found.build(model.mesh, model.chunks), scorer)
    log.warning(
        "no reference: model_name_or_path names no other model with weights, so rewards are beta times the "
        "log-probabilities alone"
    )
    return None


def _of_the_beginning(cfg: Config) -> str:
    """What to say of a reference that followed the policy in training, which checkpoints alone have."""
    follows = cfg.method.reads("ref_model_update_steps") and cfg.ref_model_update_steps > 0
    return (
        ", as it was before training: evaluations during training compared with the reference that ref_model_update_"
        f"steps: {cfg.ref_model_update_steps} moved, so their numbers differ"
        if follows
        else ""
    )


def _start_of_adapter(cfg: Config, model: CausalLM, path: Path) -> dict[str, paddle.Tensor] | None:
    """What training.reference.before_training takes, of the adapter in `path`."""
    if not cfg.lora_path or Path(cfg.lora_path).resolve() == path.resolve():
        log.info("reference: the model without its adapter")
        return None
    log.info(f"reference: the model with the adapter of lora_path ({cfg.lora_path}), with which training began")
    start = adapter_values(model)
    load_adapter(model, cfg.lora_path, into=start)
    return start
