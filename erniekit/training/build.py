"""Builds everything that a run needs from a configuration: first the model's keys and the data are checked, then the
model is built (erniekit/build.py), then gradient synchronisation, optimizer and recipe.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import paddle

from erniekit.build import PreparedModel, prepare_model, training_options
from erniekit.checkpoint.model_dir import require_model, require_weights
from erniekit.checkpoint.model_shape import (
    directories,
    model_config,
    processor_directory,
    require_pictures,
    vision_start,
)
from erniekit.config import rl_keys
from erniekit.config.schema import Config
from erniekit.config.schema_parallel import ZERO_STAGES
from erniekit.data.chat.template import Template
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.data.evaluated_kinds import require_metric
from erniekit.data.loader import Loader, StepSource
from erniekit.data.record_feed import training_template
from erniekit.data.vision.options import vision_spec
from erniekit.data.vision.processor_files import read_settings
from erniekit.join import require_same_files
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import placements
from erniekit.models.pipeline_layout import (
    assign_layers,
    check_layout,
    layout_lines,
    parameter_chunks,
    plan_actions,
    schedule_of,
)
from erniekit.models.sharded_blocks import weights_line
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.grad_sync import GradientSync
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.pipeline_schedule import Action
from erniekit.parallel.zero import ShardedParameters
from erniekit.quantize.trained import check_export
from erniekit.training import muon
from erniekit.training.adamw import AdamW, parameter_rules
from erniekit.training.batch_warmup import last_step, warmup_steps
from erniekit.training.best import BestModel
from erniekit.training.data import DataContext
from erniekit.training.ema import WeightAverage
from erniekit.training.evaluators import EvaluationData
from erniekit.training.fit_check import warn_if_too_large
from erniekit.training.freezing import check_frozen, freeze, freeze_untrained_mtp
from erniekit.training.lr_scheduler import Schedule, build_schedule
from erniekit.training.methods import Method, method_of
from erniekit.training.moments import MomentDtype
from erniekit.training.recipes.base import Recipe, RecipeContext
from erniekit.training.short_runs import warn_if_too_short
from erniekit.training.state_storage import build_storage
from erniekit.training.trainable import describe_lora
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


@dataclass
class Run:
    """A run that is ready to start. `best` compares evaluations; None if nothing is evaluated."""

    cfg: Config
    method: Method
    output_dir: Path
    model_dir: Path
    tokenizer_dir: Path
    mesh: Mesh
    model: CausalLM
    actions: Callable[[int], list[Action]]
    tokenizer: Tokenizer
    template: Template | None
    recipe: Recipe
    sync: GradientSync
    optimizer: AdamW
    schedule: Schedule
    max_steps: int
    loader: StepSource
    eval_loader: EvaluationData | None
    best: BestModel | None
    update_router_bias: bool
    average: WeightAverage | None

    def plan_steps(self, done: int) -> None:
        """Set the last step and the schedule for a run that has done `done` steps and continues at its
        loader's position.
        """
        cfg = self.cfg
        self.max_steps = last_step(cfg, self.loader, self.mesh.degrees.batch, done)
        self.schedule = build_schedule(cfg, self.max_steps)
        warn_if_too_short(cfg, self.max_steps, done)
        if cfg.max_steps > 0:
            return
        if self.loader.steps_left() is not None:
            log.info(
                f"num_train_epochs: {cfg.num_train_epochs:g}: {count_of(self.max_steps - done, 'step')}"
                + (f" after step {done}" if done else "")
            )
            return
        rows = f"{'' if self.loader.exact else 'about '}{count_of(round(self.loader.rows_left()), 'row')}"
        after = f" after step {done}" if done else ""
        each = cfg.batch_size * cfg.gradient_accumulation_steps * self.mesh.degrees.batch
        fewer = " (fewer during batch_size_warmup_steps)" if done < warmup_steps(cfg) else ""
        log.info(
            f"num_train_epochs: {cfg.num_train_epochs:g}: {rows}{after} at {each} a step{fewer}: "
            f"{count_of(self.max_steps - done, 'step')}"
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


def build_optimizer(
    cfg: Config, model: CausalLM, parameters: ShardedParameters, matrices: Mapping[str, muon.MatrixLayout]
) -> AdamW:
    """The optimizer that `optim` names; `matrices` are those that Muon updates, none for AdamW."""
    arguments = (
        parameters,
        parameter_rules(model, cfg),
        cfg.adam_beta1,
        cfg.adam_beta2,
        cfg.adam_epsilon,
        cast(MomentDtype, cfg.moment_dtype),
        build_storage(cfg.offload_optim, cfg.tensorwise_offload_optimizer, cfg.emulate_precision),
    )
    if cfg.optim != "muon":
        return AdamW(*arguments)
    if matrices:
        sizes = sum(entry.size for name, entry in parameters.entries.items() if name in matrices)
        log.info(
            f"optim: muon updates {count_of(len(matrices), 'parameter')} ({sizes / 1e6:.2f} M numbers), adamw the "
            "others"
        )
    return muon.Muon(*arguments, matrices=matrices, options=muon.MuonOptions.from_config(cfg))


def build_run(cfg: Config, mesh: Mesh, method: Method | None = None) -> Run:
    """Build what this process needs, in the order of the module's docstring. `method`: None stands for the one that the
    configuration names.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can fix.
    """
    assert cfg.output_dir, "config.load requires it to train"
    method = method_of(cfg) if method is None else method
    seed_everything(cfg.seed)
    model_dir, tokenizer_dir = directories(cfg)
    require_model(model_dir)
    prepared = prepare(cfg, model_dir, mesh)
    tokenizer = load_tokenizer(tokenizer_dir)
    check_fits(tokenizer, prepared.config.vocab_size, str(model_dir))
    require_pictures(cfg, prepared.config, model_dir)
    template, loader, eval_loader = _open_data(cfg, method, prepared, tokenizer, mesh)
    max_steps = last_step(cfg, loader, mesh.degrees.batch)
    loader.announce()
    schedule = build_schedule(cfg, max_steps)
    warn_if_too_short(cfg, max_steps)
    for line in layout_lines(cfg, prepared.config, mesh.degrees):
        log.info(line)
    check_frozen(cfg, prepared.config, prepared.adapter)
    with all_or_none(mesh.world_group):
        method.check(cfg, prepared, tokenizer, mesh.degrees)
    check_export(cfg.qat, prepared.config, cfg.quantization_group_size)
    warn_if_too_large(cfg, prepared.config, mesh)
    # All checks of the configuration are done; weights are read from here on.
    chunks = assign_layers(cfg, prepared.config, mesh.degrees.pipeline)[mesh.pipe]
    model = prepared.build(mesh, chunks)
    if cfg.fine_tuning == "LoRA":
        describe_lora(model, cfg, model_dir)
    elif cfg.continue_training and prepared.config.dtype not in (None, saved := prepared.options.precision.param_dtype):
        log.info(f"{model_dir} holds {prepared.config.dtype}; what this run saves is {saved}")
    freeze_untrained_mtp(model, cfg)
    freeze(model, cfg)
    where, matrices = placements(model, mesh, bool(cfg.sharding)), muon.matrix_layouts(model, cfg, mesh)
    parameters = ShardedParameters(
        model.named_parameters(), where, parameter_chunks(model, chunks), one_moment=matrices, units=model.units
    )
    sync = GradientSync(
        parameters,
        zero_stage=ZERO_STAGES[cfg.sharding],
        master_grad=cfg.amp_master_grad,
        overlap=mesh.world_group.handle is not None,
    )
    optimizer = build_optimizer(cfg, model, parameters, matrices)
    if mesh.world > 1:
        log.info(sync.memory_line(cfg.moment_dtype))
    if model.units is not None and model.units.units:
        log.info(weights_line(model))
    return Run(
        cfg=cfg,
        method=method,
        output_dir=Path(cfg.output_dir),
        model_dir=model_dir,
        tokenizer_dir=tokenizer_dir,
        mesh=mesh,
        model=model,
        actions=partial(
            plan_actions, schedule_of(cfg), mesh.degrees.pipeline, len(chunks), mesh.blocking_sends, mesh.pipe
        ),
        tokenizer=tokenizer,
        template=template,
        recipe=method.build_recipe(RecipeContext(cfg, prepared, model, tokenizer, template, loader)),
        sync=sync,
        optimizer=optimizer,
        schedule=schedule,
        max_steps=max_steps,
        loader=loader,
        eval_loader=eval_loader,
        best=None if eval_loader is None else BestModel(cfg, eval_loader.identity),
        update_router_bias=_wants_bias_update(cfg, model.config),
        average=None if cfg.ema_decay is None else WeightAverage(model, cfg.ema_decay, optimizer),
    )


def prepare(cfg: Config, model_dir: Path, mesh: Mesh) -> PreparedModel:
    """Prepare the model of a run, with all checks. An error on one rank is raised on all."""
    with all_or_none(mesh.world_group):
        shape = model_config(cfg, model_dir)
        if cfg.continue_training:
            require_weights(model_dir)
        options = dataclasses.replace(training_options(cfg), vision_start=vision_start(cfg, shape))
        prepared = prepare_model(model_dir, options, None if cfg.continue_training else shape)
        check_layout(cfg, mesh.degrees, prepared.config)
        _require_generation(cfg, prepared)
    return prepared


def _require_generation(cfg: Config, prepared: PreparedModel) -> None:
    """ConfigError where the method generates with weights that this device cannot multiply."""
    dtype = prepared.options.precision.param_dtype
    if rl_keys.generates(cfg) and dtype != "float32" and paddle.get_device() == "cpu":
        raise ConfigError(rl_keys.no_generation(cfg))


def _open_data(
    cfg: Config, method: Method, prepared: PreparedModel, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[Template | None, StepSource, EvaluationData | None]:
    """The chat template, the training data, and those of evaluations if there are any; the same on every rank. The
    template of a model that sees pictures is used for text, too.
    """
    model_dir, vision = prepared.path, prepared.config.vision
    wants_eval = cfg.do_eval or cfg.evaluation_strategy != "no"
    with all_or_none(mesh.world_group):
        template = training_template(cfg, tokenizer, vision is not None)
        spec = None
        if cfg.method.vision and vision is not None:
            spec = vision_spec(cfg, read_settings(processor_directory(cfg, model_dir), vision.patching))
        context = DataContext(cfg, tokenizer, template, mesh, spec)
        loader = method.open_data(context)
        eval_loader = method.open_evaluation_data(context) if wants_eval else None
        # Where epochs decide the steps, the training data is measured anyway; an evaluation may come after hours.
        for rows in (loader if cfg.max_steps > 0 else None, eval_loader):
            if isinstance(rows, Loader):
                rows.require_samples()
        if isinstance(eval_loader, Loader):
            require_metric(cfg, eval_loader)
    data = {f"training data: {name}": value for name, value in loader.identity.items()}
    if eval_loader is not None:
        data |= {f"evaluation data: {name}": value for name, value in eval_loader.identity.items()}
    require_same_files(model_dir, prepared.adapter_dir, data, mesh.world_group)
    return template, loader, eval_loader


def _wants_bias_update(cfg: Config, config: ModelConfig) -> bool:
    """Whether to use loss-free balancing: moe_use_aux_free, or the model's config.json if the key is not set."""
    if cfg.freeze_router_bias and cfg.method.reads("freeze_router_bias"):
        return False
    asked = bool(config.extra.get("moe_use_aux_free", False)) if cfg.moe_use_aux_free is None else cfg.moe_use_aux_free
    return asked and config.moe_num_experts > 0
