"""Checks the model's files, the tokenizer, the chat template, and how the ranks divide the model."""

from dataclasses import dataclass, field
from pathlib import Path

from erniekit import hub
from erniekit.checkpoint.model_dir import (
    find_checkpoint,
    has_weights,
    holds_model,
    list_checkpoints,
    require_model,
    require_weights,
)
from erniekit.checkpoint.model_reader import read_config
from erniekit.checkpoint.model_shape import adds_vision, model_config, processor_directory, require_pictures
from erniekit.checkpoint.processor import settings_of
from erniekit.cli import launch
from erniekit.cli.check.report import Report, Section
from erniekit.config import Config
from erniekit.config.compat import DATA
from erniekit.config.judged_steps import lone_answer_line
from erniekit.data.chat.template import Template, load_template
from erniekit.data.chat.tokenizer import Tokenizer, check_fits, load_tokenizer
from erniekit.data.record_feed import training_template
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.options import inference_spec, vision_spec
from erniekit.data.vision.processor_files import read_settings
from erniekit.data.vision.template import load_vision_template
from erniekit.models.config import ModelConfig
from erniekit.models.overrides import overrides_of, training_overrides
from erniekit.models.pipeline_layout import check_layout, chunks_to_use, layout_lines
from erniekit.models.weights import num_parameters
from erniekit.parallel.mesh import ParallelDims
from erniekit.utils.wording import count_of

_COMMON_RANKS = 128  # up to this one a rank is not compared with the model, which takes seconds


@dataclass
class ModelFacts:
    """The facts that later checks need; None for a fact that could not be read."""

    model_config: ModelConfig | None = None
    tokenizer: Tokenizer | None = None
    template: Template | None = None
    degrees: ParallelDims | None = None
    vision: VisionSpec | None = None
    frozen: set[str] = field(default_factory=set)  # the parameters that are not trained


def inspect(report: Report, cfg: Config, command: str) -> ModelFacts:
    """Add the sections `model`, `layout` and `tokenizer and template`."""
    facts = ModelFacts()
    section = report.section("model")
    directory, tokenizer = _directories(section, cfg, command)
    if directory is not None:
        with section.collecting():
            facts.model_config = _model_config(section, cfg, directory, command)
            facts.vision = _vision(cfg, facts.model_config, directory, command)
    if command == "train":
        _layout(report.section("layout"), cfg, directory, tokenizer, facts)
    elif command in launch.ON_RANKS:
        _layout_to_use(report.section("layout"), cfg, facts, command)
    if tokenizer is not None and command in launch.ON_RANKS:
        _tokenizer(report.section("tokenizer and template"), cfg, tokenizer, command, facts)
    return facts


def _directories(section: Section, cfg: Config, command: str) -> tuple[Path | None, Path | None]:
    """The directories of the model and of its tokenizer on this machine; nothing is downloaded. If the configuration
    gives the model's shape, the tokenizer's directory stands for both.
    """
    model: Path | None = None
    tokenizer: Path | None = None
    with section.collecting():
        model = _trained(cfg, command) if command != "train" else None
        if model is None and cfg.model_name_or_path:
            model = _here(section, cfg.model_name_or_path, hub.find_model(cfg.model_name_or_path))
        tokenizer = model
        if command in launch.ON_RANKS and cfg.tokenizer_name_or_path:
            found = hub.find_tokenizer(cfg.tokenizer_name_or_path)
            tokenizer = _here(section, cfg.tokenizer_name_or_path, found)
            model = model if cfg.model_name_or_path else tokenizer
    return model, tokenizer


def _here(section: Section, name: str, path: Path | None) -> Path | None:
    if path is None:
        section.add(
            "note",
            f"{name} is not a local path: the command downloads it. The model, how ranks divide it, its tokenizer and "
            "the lengths of the data are checked once it is on this machine",
        )
    return path


def _trained(cfg: Config, command: str) -> Path | None:
    """The model that `checkpoint` names or a run left in output_dir; None for an adapter. `export` and `split` need one
    of them, other commands take model_name_or_path instead.
    """
    path: Path | None = None
    is_needed = command not in launch.ON_RANKS and cfg.lora_path is None
    if cfg.checkpoint:
        path = find_checkpoint(Path(cfg.checkpoint))
    elif cfg.output_dir and (is_needed or list_checkpoints(Path(cfg.output_dir)) or holds_model(Path(cfg.output_dir))):
        path = find_checkpoint(cfg.output_dir)
    return path if path is not None and has_weights(path) else None


def _model_config(section: Section, cfg: Config, directory: Path, command: str) -> ModelConfig:
    require_model(directory)
    wants_weights = command != "train" or cfg.continue_training
    gets_vision = _gets_vision(cfg, directory, command)
    stored = model_config(cfg, directory) if command == "train" or gets_vision else ModelConfig.from_dir(directory)
    if command in launch.ON_RANKS and cfg.continue_training:
        with section.collecting():
            require_weights(directory)
    if wants_weights and has_weights(directory):
        of_weights = read_config(directory)  # this opens the files and compares every name and shape
        stored = stored if gets_vision else of_weights
    experts = f", {stored.moe_num_experts} experts a sparse layer" if stored.moe_num_experts else ""
    start = "" if wants_weights else f"; training starts at random (seed {cfg.seed})"
    section.add(
        "ok",
        f"{directory}: {stored.model_type}, {num_parameters(stored):,} parameters, "
        f"{count_of(stored.num_hidden_layers, 'layer')}{experts}{start}",
    )
    if cfg.max_seq_len > stored.max_position_embeddings:
        section.add(
            "warning",
            f"max_seq_len: {cfg.max_seq_len} is more than the model's max_position_embeddings "
            f"{stored.max_position_embeddings}: it has not seen such positions",
        )
    if command not in launch.ON_RANKS:
        return stored
    return (training_overrides(cfg) if command == "train" else overrides_of(cfg)).apply(stored)


def _gets_vision(cfg: Config, directory: Path, command: str) -> bool:
    """Whether the command uses the text model in `directory` as vision_config_path makes it a vision-language model."""
    starts = command == "train" or (
        command in launch.ON_RANKS and cfg.lora_path is None and _trained(cfg, command) is None
    )
    return starts and adds_vision(cfg, ModelConfig.from_dir(directory))


def _vision(cfg: Config, model: ModelConfig, directory: Path, command: str) -> VisionSpec | None:
    """How the command reads pictures; None if it reads none."""
    if command not in DATA:
        return None
    require_pictures(cfg, model, directory)
    if model.vision is None:
        return None
    if command == "eval":  # as generation.load.find_model
        beside = processor_directory(cfg, directory) if _gets_vision(cfg, directory, command) else directory
        return inference_spec(cfg, settings_of(beside, model=model.vision.patching))
    if not cfg.method.vision:
        return None
    return vision_spec(cfg, read_settings(processor_directory(cfg, directory), model.vision.patching))


def _layout(section: Section, cfg: Config, directory: Path | None, tokenizer: Path | None, facts: ModelFacts) -> None:
    with section.collecting():
        facts.degrees = launch.degrees_of(cfg)
        if facts.model_config is None or directory is None:
            processes = count_of(facts.degrees.world, "process", "processes")
            section.add("ok", f"{processes}; whether the degrees divide the model is not known yet")
            return
        check_layout(cfg, facts.degrees, facts.model_config)
        if _is_compared_with_modules(cfg):
            directories = directory, tokenizer or directory
            facts.frozen = _named_modules(section, cfg, directories, facts.model_config, facts.degrees)
        if facts.degrees.world == 1:
            number = cfg.num_microbatches(data_ranks=1)
            rows = count_of(cfg.batch_size * number, "row")
            microbatches = count_of(number, "microbatch", "microbatches")
            section.add("ok", f"one process; a step takes {rows}: {microbatches} of {count_of(cfg.batch_size, 'row')}")
        for line in layout_lines(cfg, facts.model_config, facts.degrees):
            section.add("note" if "no effect" in line else "ok", line)
        lone = lone_answer_line(cfg, facts.degrees.batch)
        if lone is not None:
            section.add("warning", lone)


def _layout_to_use(section: Section, cfg: Config, facts: ModelFacts, command: str) -> None:
    """Reports how the ranks divide a model for a command other than `train`."""
    with section.collecting():
        degrees, remark = launch.degrees_of(cfg, command), "; whether they divide the model is not known"
        if facts.model_config is not None:
            chunks_to_use(cfg, facts.model_config, degrees, stage=0)
            remark = ""
        section.add("ok", f"{count_of(degrees.world, 'process', 'processes')}{remark}")


def _is_compared_with_modules(cfg: Config) -> bool:
    """Whether keys name modules of the model or another model, or ask for what some modules cannot have."""
    adapts = cfg.fine_tuning == "LoRA"
    asks = adapts and (cfg.lora_rank > _COMMON_RANKS or cfg.use_dora or cfg.lora_path or cfg.lora_target_modules)
    named = cfg.modules_to_save or cfg.freeze_config or cfg.frozen_parameters
    return bool(asks or named or cfg.qat != "none" or cfg.method.reads("teacher_model_name_or_path"))


def _named_modules(
    section: Section, cfg: Config, directories: tuple[Path, Path], model_config: ModelConfig, degrees: ParallelDims
) -> set[str]:
    """Checks that the model has what is to be adapted, frozen or quantised, as the run does before it reads weights.
    Returns the frozen parameters.
    """
    try:  # imports Paddle, which takes seconds
        from erniekit.cli.check import modules
    except ModuleNotFoundError as error:
        if error.name != "paddle":
            raise
        names = "lora_rank, use_dora, lora_path, lora_target_modules, modules_to_save, freeze_config, frozen_parameters"
        section.add("note", f"{names}, qat: not compared with the model: PaddlePaddle is not installed here")
        return set()
    return modules.check(cfg, *directories, model_config, degrees)


def _tokenizer(section: Section, cfg: Config, directory: Path, command: str, facts: ModelFacts) -> None:
    with section.collecting():
        tokenizer = facts.tokenizer = load_tokenizer(directory)
        files = ", ".join(file.name for file in tokenizer.files)
        section.add("ok", f"{files}: {tokenizer.vocab_size} tokens, end token {_named(tokenizer, tokenizer.eos_id)}")
        if facts.model_config is not None:
            check_fits(tokenizer, facts.model_config.vocab_size, str(directory))
        sees_pictures = facts.model_config is not None and facts.model_config.vision is not None
        template: Template | None
        if command == "train":
            template = training_template(cfg, tokenizer, sees_pictures)
        else:
            template = (load_vision_template if sees_pictures else load_template)(tokenizer, cfg.chat_template)
        facts.template = template
        if template is None:
            section.add("ok", "no chat template: the data is plain text")
            return
        ends = ", ".join(_named(tokenizer, i) for i in template.trained_end_ids)
        section.add("ok", f"chat template {template.name}: a trained answer ends with {ends or 'no token'}")
    if section.has_errors:
        facts.tokenizer = None  # nothing can be encoded; without it, the data checks report that only once


def _named(tokenizer: Tokenizer, number: int) -> str:
    return f"{tokenizer.decode([number])!r} ({number})"
