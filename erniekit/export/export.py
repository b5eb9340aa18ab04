"""Exports a trained checkpoint as a model directory for other tools: weights, configuration, tokenizer, template."""

from pathlib import Path

from erniekit.checkpoint.adapter_config import base_of, read_adapter_config
from erniekit.checkpoint.adapter_origin import say_if_base_differs
from erniekit.checkpoint.chat_template import write_chat_template
from erniekit.checkpoint.model_dir import (
    TOKENIZER_FILES,
    copy_companions,
    find_checkpoint,
    is_adapter,
    list_checkpoints,
    require_adapter,
)
from erniekit.checkpoint.model_files import say_if_not_applied
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.checkpoint.processor import complete_for_transformers, settings_of, write_processor
from erniekit.config import Config
from erniekit.data.chat.template import load_template, say_if_trained_otherwise
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.vision.template import load_vision_template
from erniekit.export.convert import Report, require_apart, rewrite
from erniekit.export.merge import Merge
from erniekit.export.quantise import (
    EditedModel,
    Quantisation,
    QuantisedReport,
    check_quantised,
    describe,
    write_quantised,
)
from erniekit.export.target import check_target, model_target
from erniekit.models.config import Format, ModelConfig
from erniekit.models.overrides import Overrides, overrides_of
from erniekit.quantize.calibrated import calibrated, needs_calibration, say_if_interrupted
from erniekit.quantize.calibration import find_data
from erniekit.quantize.quantiser import Quantiser, RoundToNearest
from erniekit.quantize.schemes import Options, Scheme
from erniekit.quantize.trained import AsTrained, say_if_groups_differ, say_if_qat_differs
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError

OVERWRITE = "overwrite_output_dir: true"


def export(cfg: Config) -> Report:
    """Export the checkpoint that `cfg` names to `output_dir`/export, in `format`, in files of `max_shard_size` GB."""
    found = checkpoint_of(cfg)
    say_if_not_applied(cfg, found)
    checkpoint, adapter = _with_base(found, cfg)
    if adapter is not None:
        say_if_base_differs(adapter, cfg)
    if not needs_calibration(cfg):
        say_if_interrupted(output_of(cfg))
    return export_checkpoint(
        checkpoint,
        output_of(cfg) / "export",
        format=_format_of(cfg),
        max_shard_size=f"{cfg.max_shard_size}GB",
        chat_template=cfg.chat_template,
        copy_tokenizer=cfg.copy_tokenizer,
        adapter_dir=adapter,
        overwrite=cfg.overwrite_output_dir,
        # A full model has the overrides in its config.json already; an adapter was trained on its base with the
        # overrides.
        overrides=None if adapter is None else overrides_of(cfg),
        quantisation=quantisation_of(cfg, checkpoint, adapter),
    )


def check_export(cfg: Config) -> None:
    """Raise what `export` raises before it reads a weight: a target with another model, and of a quantised model a
    scheme that does not fit, a model that is quantised already, calibration data that is not there.
    """
    checkpoint, adapter = _with_base(checkpoint_of(cfg), cfg)
    sources = [checkpoint] if adapter is None else [checkpoint, adapter]
    check_target(output_of(cfg) / "export", "export", sources, cfg.overwrite_output_dir, OVERWRITE)
    quantisation = quantisation_of(cfg, checkpoint, adapter)
    if quantisation is None:
        return
    calibrates = needs_calibration(cfg)
    overrides = None if adapter is None else overrides_of(cfg)
    check_quantised(checkpoint, _format_of(cfg), quantisation, calibrates, overrides)
    if cfg.quantization_calibration_path is not None:
        find_data(cfg.quantization_calibration_path, cfg.download_hub)


def _format_of(cfg: Config) -> Format:
    return "paddle" if cfg.format == "paddle" else "pt"


def quantisation_of(cfg: Config, checkpoint: Path, adapter: Path | None) -> Quantisation | None:
    """How the configuration quantises the model that it exports; None in 16 bits. A model that was trained for a scheme
    (qat) keeps the ranges of inputs beside its weights or its adapter; calibration that is asked for replaces them.
    """
    if cfg.quantization == "none":
        return None

    def quantiser(source: EditedModel, scheme: Scheme) -> Quantiser:
        say_if_qat_differs(adapter or checkpoint, cfg.qat)
        if needs_calibration(cfg):
            return calibrated(cfg, checkpoint, adapter, source.config, source, scheme)
        if cfg.qat != "none":
            say_if_groups_differ(adapter or checkpoint, cfg.qat, scheme, source.config)
            return AsTrained(cfg.quantization_clip_search, directory=adapter or checkpoint)
        return RoundToNearest(cfg.quantization_clip_search)

    options = Options(cfg.quantization_group_size, cfg.quantization_first_layers)
    return Quantisation(cfg.quantization, options, quantiser)


def _with_base(checkpoint: Path, cfg: Config) -> tuple[Path, Path | None]:
    """(model, None), or (base, adapter) if the checkpoint is an adapter."""
    if not is_adapter(checkpoint):
        return checkpoint, None
    return base_of(checkpoint, cfg.model_name_or_path, cfg.download_hub), checkpoint


def output_of(cfg: Config) -> Path:
    """The directory `output_dir`, below which these commands write."""
    assert cfg.output_dir, "config/checks.py requires it"
    return Path(cfg.output_dir)


def checkpoint_of(cfg: Config) -> Path:
    """The directory that the key `checkpoint` names or, of a run, what `find_checkpoint` chooses there; else that of
    `output_dir`; else the adapter that `lora_path` names. Raises CheckpointError where there is none.
    """
    if cfg.checkpoint:
        if not Path(cfg.checkpoint).is_dir():
            raise CheckpointError(f"checkpoint: there is no directory {cfg.checkpoint!r} (looked in {Path.cwd()}).")
        named = Path(cfg.checkpoint)
        return find_checkpoint(named) if list_checkpoints(named) else named
    try:
        return find_checkpoint(output_of(cfg))
    except CheckpointError:
        if cfg.lora_path is None:
            raise
    return require_adapter(cfg.lora_path)


def export_checkpoint(
    checkpoint_dir: str | Path,
    target_dir: str | Path,
    format: Format = "pt",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    chat_template: str | None = None,
    copy_tokenizer: bool = True,
    adapter_dir: str | Path | None = None,
    overwrite: bool = False,
    overrides: Overrides | None = None,
    quantisation: Quantisation | None = None,
) -> Report:
    """Write a full checkpoint (either layout, with config.json and tokenizer files) to `target_dir`, and verify it.

    `adapter_dir`: an adapter for it, which is merged into the weights in fp32. `dtype`: the type of the weights; None
    keeps the checkpoint's. `chat_template`: the name of a built-in template, or a .jinja file; None uses that of the
    adapter or of the checkpoint, otherwise `text`. Another model in `target_dir` is replaced only with `overwrite`.
    `overrides`: changes of config.json. `quantisation`: quantise the weights; the others are bf16, and `dtype` is not
    read. Raises CheckpointError for an incomplete checkpoint or a full disk, and ConfigError for a scheme that does not
    fit.
    """

    def merge(source: ModelReader) -> Merge:
        assert adapter_dir is not None
        if not source.config.has_score_head and "score" in read_adapter_config(Path(adapter_dir)).saved:
            raise CheckpointError(
                f"{adapter_dir} is the adapter of a reward model (stage: RM): its base is a language model, into which "
                "a score head cannot be merged. Use the adapter as it is: `eval` and reward_model_path read it with "
                "its base."
            )
        return Merge(read_adapter(adapter_dir, source.config, checkpoint_dir), source.config)

    sources = [checkpoint_dir] if adapter_dir is None else [checkpoint_dir, adapter_dir]
    for source in sources:
        require_apart(source, target_dir)
    with model_target(target_dir, "export", sources, overwrite, OVERWRITE) as staging:
        edit = merge if adapter_dir else None
        if quantisation is not None:
            assert dtype is None
            report: Report = write_quantised(
                checkpoint_dir, staging, format, quantisation, max_shard_size, edit, overrides
            )
        else:
            report = rewrite(checkpoint_dir, staging, format, max_shard_size, dtype, edit, overrides)
        copied = copy_companions(checkpoint_dir, staging, with_tokenizer=copy_tokenizer)
        config, adapter = ModelConfig.from_dir(staging, quiet=True), None if adapter_dir is None else Path(adapter_dir)
        write_processor(staging, config, settings_of(adapter, Path(checkpoint_dir)))
        if set(copied) & {"tokenizer.json", "tokenizer.model"}:
            trained = Path(adapter_dir or checkpoint_dir)
            load = load_template if config.vision is None else load_vision_template
            template = load(load_tokenizer(checkpoint_dir), chat_template, trained)
            say_if_trained_otherwise(trained, template)
            write_chat_template(staging, template.source, template.trained_end_ids)
            if format == "pt":
                complete_for_transformers(staging, config)
        elif copy_tokenizer:
            log.warning(f"{checkpoint_dir} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}): none is exported")
    compared = f"read again and equal to {checkpoint_dir}"
    if adapter_dir is not None:
        compared = f"{checkpoint_dir} with the adapter {adapter_dir} merged into it, read again"
    if isinstance(report, QuantisedReport):
        compared = "read again and equal to what was written"
        log.info(describe(report))
    log.info(f"{target_dir}: {report}, layout {format}; {compared}")
    return report
