"""From a configuration to everything a run needs: first the model's keys and the data are checked, then the model is
built (erniekit/build.py), then gradient synchronisation, optimizer and recipe.
"""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from erniekit import lora
from erniekit.build import PreparedModel, prepare_model, training_options
from erniekit.checkpoint.model_dir import require_model, require_weights
from erniekit.checkpoint.model_shape import directories, model_config
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.data.loader import Loader, build_loader
from erniekit.data.record_feed import training_template
from erniekit.losses.preference import wants_reference
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import placements
from erniekit.models.pipeline_layout import (
    check_layout,
    cut_layers,
    layout_lines,
    parameter_chunks,
    plan_actions,
    schedule_of,
)
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.grad_sync import GradientSync
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.pipeline_schedule import Action
from erniekit.training.adamw import AdamW, parameter_rules
from erniekit.training.batch_warmup import last_step
from erniekit.training.ema import WeightAverage
from erniekit.training.lr_scheduler import Schedule, build_schedule
from erniekit.training.recipes.base import Recipe
from erniekit.training.recipes.causal import CausalRecipe
from erniekit.training.recipes.preference import PreferenceRecipe
from erniekit.training.reference import AdapterOff, ForwardPass, Reference, SecondModel
from erniekit.training.reference_cache import prepare_cache
from erniekit.training.same_run import require_same_files
from erniekit.training.trainable import describe_lora
from erniekit.utils import log


@dataclass
class Run:
    """A run ready to start."""

    cfg: Config
    output_dir: Path
    model_dir: Path
    tokenizer_dir: Path
    mesh: Mesh
    model: CausalLM
    chunks: list[tuple[int, ...]]
    actions: Callable[[int], list[Action]]
    tokenizer: Tokenizer
    template: Template | None
    recipe: Recipe
    optimizer: AdamW
    schedule: Schedule
    max_steps: int
    loader: Loader
    eval_loader: Loader | None
    update_router_bias: bool
    average: WeightAverage | None

    def plan_steps(self, done: int) -> None:
        """Set the last step and the schedule for a run that has done `done` steps and continues where its loader is."""
        cfg = self.cfg
        self.max_steps = last_step(cfg, self.loader, self.mesh.degrees.data, done)
        self.schedule = build_schedule(cfg, self.max_steps)
        if cfg.max_steps > 0:
            return
        rows = f"{'' if self.loader.exact else 'about '}{self.loader.rows_left():.0f} rows"
        after = f" after step {done}" if done else ""
        each = cfg.batch_size * cfg.gradient_accumulation_steps * self.mesh.degrees.data
        fewer = " (fewer during batch_size_warmup_steps)" if done < cfg.batch_size_warmup_steps else ""
        log.info(
            f"num_train_epochs: {cfg.num_train_epochs:g}: {rows}{after} at {each} a step{fewer}: "
            f"{self.max_steps - done} steps"
        )

    def close(self) -> None:
        """Stop the data workers."""
        self.loader.close()
        if self.eval_loader is not None:
            self.eval_loader.close()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and Paddle."""
    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def build_run(cfg: Config, mesh: Mesh) -> Run:
    """Build this process's part in the order of the module's title. ConfigError, DataError and CheckpointError name
    what the user can mend.
    """
    assert cfg.output_dir, "config.load requires it to train"
    if cfg.stage == "DPO":
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)  # config.support says so
    seed_everything(cfg.seed)
    model_dir, tokenizer_dir = directories(cfg)
    require_model(model_dir)
    prepared = prepare(cfg, model_dir, mesh)
    tokenizer = load_tokenizer(tokenizer_dir)
    check_fits(tokenizer, prepared.config.vocab_size, str(model_dir))
    template, loader, eval_loader = _open_data(cfg, model_dir, tokenizer, mesh)
    max_steps = last_step(cfg, loader, mesh.degrees.data)
    schedule = build_schedule(cfg, max_steps)
    for line in layout_lines(cfg, prepared.config, mesh.degrees):
        log.info(line)
    # Nothing that the configuration says is left to check: from here on weights are read.
    chunks = cut_layers(cfg, prepared.config, mesh.degrees.pipeline)[mesh.pipe]
    model = prepared.build(mesh, chunks)
    if cfg.fine_tuning == "LoRA":
        describe_lora(model, cfg, model_dir)
    elif cfg.continue_training and prepared.config.dtype not in (None, saved := prepared.options.precision.param_dtype):
        log.info(f"{model_dir} holds {prepared.config.dtype}; what this run saves is {saved}")
    mtp_depths = train_mtp(model, cfg)
    sync = GradientSync(
        model.named_parameters(),
        placements(model, mesh, bool(cfg.sharding)),
        mesh.world_group,
        stage={"": 0, "stage1": 1, "stage2": 2}[cfg.sharding],
        master_grad=cfg.amp_master_grad,
        parts=parameter_chunks(model, chunks),
    )
    optimizer = AdamW(sync, parameter_rules(model, cfg), cfg.adam_beta1, cfg.adam_beta2, cfg.adam_epsilon)
    return Run(
        cfg=cfg,
        output_dir=Path(cfg.output_dir),
        model_dir=model_dir,
        tokenizer_dir=tokenizer_dir,
        mesh=mesh,
        model=model,
        chunks=chunks,
        actions=partial(
            plan_actions, schedule_of(cfg), mesh.degrees.pipeline, len(chunks), mesh.blocking_sends, mesh.pipe
        ),
        tokenizer=tokenizer,
        template=template,
        recipe=_recipe(cfg, prepared, model, chunks, mesh, tokenizer, mtp_depths),
        optimizer=optimizer,
        schedule=schedule,
        max_steps=max_steps,
        loader=loader,
        eval_loader=eval_loader,
        update_router_bias=_wants_bias_update(cfg, model.config),
        average=None if cfg.ema_decay is None else WeightAverage(model, cfg.ema_decay, optimizer),
    )


def _recipe(
    cfg: Config,
    prepared: PreparedModel,
    model: CausalLM,
    chunks: list[tuple[int, ...]],
    mesh: Mesh,
    tokenizer: Tokenizer,
    mtp_depths: int,
) -> Recipe:
    """The method that `stage` names. `model` has its first weights: it is still its own reference."""
    if cfg.stage != "DPO":
        return CausalRecipe(cfg, mtp_depths)
    forward = ForwardPass(mesh, chunks, cfg.loss_subbatch_seqlen)
    adapted = lora.state_of(model) is not None
    reference: Reference | None = None
    if wants_reference(cfg) and cfg.ref_logps_cache:
        log_probs = AdapterOff(model, forward).log_probs if adapted else partial(forward.log_probs, model)
        reference = prepare_cache(cfg, prepared.path, model, mesh, tokenizer, log_probs)
    elif wants_reference(cfg) and adapted:
        reference = AdapterOff(model, forward)
        log.info("reference: the model without its adapter")
    elif wants_reference(cfg):
        reference = SecondModel(prepared.build(mesh, chunks), forward)
        log.info("reference: a second copy of the model (ref_logps_cache would spare its memory)")
    return PreferenceRecipe(cfg, model, forward, reference)


def prepare(cfg: Config, model_dir: Path, mesh: Mesh) -> PreparedModel:
    """The model of a run, checked but not built. An error on one rank is raised on all."""
    with all_or_none(mesh.world_group):
        shape = model_config(cfg, model_dir)
        if cfg.continue_training:
            require_weights(model_dir)
        prepared = prepare_model(model_dir, training_options(cfg), None if cfg.continue_training else shape)
        check_layout(cfg, mesh.degrees, prepared.config)
    return prepared


def _open_data(
    cfg: Config, model_dir: Path, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[Template | None, Loader, Loader | None]:
    """The chat template, the training data, and those of evaluations if there are any; the same on every rank. While
    the batch still grows, the training data come one microbatch at a time.
    """
    growing = dataclasses.replace(cfg, gradient_accumulation_steps=1) if cfg.batch_size_warmup_steps else cfg
    wants_eval = cfg.do_eval or cfg.evaluation_strategy != "no"
    with all_or_none(mesh.world_group):
        template = training_template(cfg, tokenizer)
        build = partial(build_loader, tokenizer=tokenizer, rank=mesh.data, world=mesh.degrees.data, template=template)
        loader = build(growing, split="train")
        eval_loader = build(cfg, split="eval") if wants_eval else None
    data = {f"training data: {name}": value for name, value in loader.identity.items()}
    if eval_loader is not None:
        data |= {f"evaluation data: {name}": value for name, value in eval_loader.identity.items()}
    require_same_files(model_dir, data, mesh.world_group)
    return template, loader, eval_loader


def train_mtp(model: CausalLM, cfg: Config) -> int:
    """Depths of multi-token prediction that are trained. Blocks the model has beyond that are kept as they are,
    frozen.
    """
    kept = model.config.num_nextn_predict_layers - cfg.num_nextn_predict_layers
    if kept > 0:
        log.info(
            f"num_nextn_predict_layers: {cfg.num_nextn_predict_layers}: {kept} of the model's multi-token-prediction "
            "blocks are kept, not trained"
        )
        decoder = model.model
        for depth in range(cfg.num_nextn_predict_layers, len(decoder.mtp_block)):
            for parameter in (p for layer in decoder.mtp_layers(depth) for p in layer.parameters()):
                parameter.stop_gradient = True
    return cfg.num_nextn_predict_layers


def _wants_bias_update(cfg: Config, config: ModelConfig) -> bool:
    """moe_use_aux_free, or what the model's config.json says where the key is not set."""
    asked = bool(config.extra.get("moe_use_aux_free", False)) if cfg.moe_use_aux_free is None else cfg.moe_use_aux_free
    return asked and config.moe_num_experts > 0
