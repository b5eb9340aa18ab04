"""Checks the output directory: its present content, and whether the checkpoints fit on its disk."""

import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from erniekit.checkpoint.dtypes import num_bytes
from erniekit.cli import launch
from erniekit.cli.check.data import Steps
from erniekit.cli.check.model import ModelFacts
from erniekit.cli.check.report import Report, Section
from erniekit.config import Config
from erniekit.models.config import ModelConfig
from erniekit.models.weights import Shape, layer_matrices, num_parameters, our_shapes
from erniekit.training.moment_codes import CODES
from erniekit.utils.directory_lock import require_usable
from erniekit.utils.wording import count_of

FP32_BYTES = 4
MOMENT_BYTES = 8  # AdamW's two moments, which files hold in fp32, whatever moment_dtype


def inspect(report: Report, cfg: Config, facts: ModelFacts, steps: Steps) -> None:
    """Add the section `output directory`."""
    section = report.section("output directory")
    assert cfg.output_dir, "config.load requires it to train"
    path = Path(cfg.output_dir)
    with section.collecting():
        require_usable(path, "output_dir")
    if section.has_errors:
        return
    _state(section, cfg, path)
    if facts.model_config is not None:
        _space(section, cfg, path, facts.model_config, steps, facts.frozen)


def _state(section: Section, cfg: Config, path: Path) -> None:
    if cfg.resume_from_checkpoint in ("auto", "none") and not (path.is_dir() and any(path.iterdir())):
        section.add("ok", f"{path}: nothing is there; a new run starts")
        return
    with section.collecting():
        try:  # imports Paddle, which takes seconds
            from erniekit.parallel.process_group import ALONE
            from erniekit.training.output_dir import OutputDir
        except ModuleNotFoundError as error:
            if error.name != "paddle":
                raise
            section.add("note", f"{path}: not inspected, since PaddlePaddle is not installed here")
            return
        claim = OutputDir(cfg, ALONE).look()
        if claim.source is not None:
            section.add("ok", f"{path}: the run resumes from {claim.source}")
        elif claim.final is not None:
            section.add("ok", f"{path}: holds the final model of this run, of step {claim.final.step}")
        elif cfg.overwrite_output_dir:
            section.add("warning", f"{path}: overwrite_output_dir: the run that is there is removed")
        else:
            section.add("ok", f"{path}: no checkpoint is there; a new run starts")


def _space(section: Section, cfg: Config, path: Path, model: ModelConfig, steps: Steps, frozen: set[str]) -> None:
    checkpoint, final = _sizes(cfg, model, frozen)
    num_checkpoints = _max_checkpoints(cfg, steps)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed = final + (0 if num_checkpoints is None else num_checkpoints * checkpoint)
    at_most = "at most " if cfg.fine_tuning == "LoRA" else ""
    if num_checkpoints == 0:
        checkpoints = "no checkpoints"
    elif num_checkpoints is None:
        checkpoints = f"every checkpoint is kept, each of {at_most}{_size(checkpoint)}"
    else:
        checkpoints = f"up to {count_of(num_checkpoints, 'checkpoint')} at a time, each of {at_most}{_size(checkpoint)}"
    line = (
        f"disk: {checkpoints}, and a final model of {at_most}{_size(final)}: {_size(needed)}"
        f"{' and more' if num_checkpoints is None else ''}; {_size(free)} are free at {existing}"
    )
    least = final + (0 if num_checkpoints == 0 else checkpoint)
    if needed > free:
        section.add("error" if least > free else "warning", f"{line}. Set save_total_limit, or another output_dir.")
    else:
        section.add("ok", line)


def _sizes(cfg: Config, model: ModelConfig, frozen: Collection[str] = ()) -> tuple[int, int]:
    """The bytes of a checkpoint and of the final model; for adapters, an upper bound. `frozen`: the parameters that are
    saved and not trained.
    """
    saved, twice, trained, moments = _parameters(cfg, model, frozen)
    # A CPU stores 16 bits only where it emulates a GPU (precision/policy.py). Routers, which stay in fp32, are few.
    in_16_bits = cfg.compute_type != "fp32" and (launch.has_gpus() or cfg.emulate_precision)
    each = 2 if in_16_bits else FP32_BYTES
    final = (saved + twice) * (each + (0 if cfg.ema_decay is None else FP32_BYTES))
    state = 0 if cfg.ignore_save_lr_and_optim else moments + trained * (FP32_BYTES if in_16_bits else 0)
    follows = cfg.method.reads("ref_model_update_steps") and cfg.ref_model_update_steps > 0
    reference = saved * each if follows and cfg.fine_tuning != "LoRA" and not cfg.reference_free else 0
    return final + state + reference, final


def _parameters(cfg: Config, model: ModelConfig, frozen: Collection[str]) -> tuple[int, int, int, int]:
    """How many parameters are saved, how many of them a file has twice, how many are trained, and the bytes of the
    moments of these.
    """
    shapes = our_shapes(model)
    if cfg.fine_tuning == "LoRA":
        saved = sum(math.prod(shape) for name, shape in shapes.items() if _is_saved_whole(cfg, name))
        trained = _adapter_parameters(shapes, cfg.lora_rank) + saved
        # PEFT's files have a tied matrix under both names.
        return trained, saved if model.tie_word_embeddings else 0, trained, trained * MOMENT_BYTES
    of_muon = layer_matrices(model) if cfg.optim == "muon" else {}
    saved = num_parameters(model)
    trained = saved - sum(math.prod(shapes[name]) for name in frozen)
    fewer = sum(
        math.prod(shape) * MOMENT_BYTES - _moment_bytes(cfg, shape, name in of_muon)
        for name, shape in shapes.items()
        if name not in frozen
    )
    return saved, 0, trained, trained * MOMENT_BYTES - fewer


def _max_checkpoints(cfg: Config, steps: Steps) -> int | None:
    """The largest number of checkpoints on the disk at a time: a new one is written before the oldest is removed, and
    the best one may be older. None if it is not known.
    """
    if cfg.save_strategy == "no":
        return 0
    written = None
    if steps.total is not None:
        every = cfg.save_steps if cfg.save_strategy == "steps" else steps.per_epoch
        written = None if every is None else math.ceil(steps.total / every)
    if cfg.save_total_limit is None:
        return written
    limit = cfg.save_total_limit + 1 + (cfg.evaluation_strategy != "no")
    return limit if written is None else min(limit, written)


def _moment_bytes(cfg: Config, shape: Shape, of_muon: bool) -> int:
    """What a checkpoint has of one parameter's moments: Muon's one, codes in 8 or 4 bits (docs/resuming.md), or two."""
    if of_muon:
        return math.prod(shape) * FP32_BYTES
    code = CODES.get(cfg.ckpt_quant_stage)
    if code is None or not code.applies(shape):
        return math.prod(shape) * MOMENT_BYTES
    return sum(num_bytes(*field) for field in code.fields(shape).values())


def _is_saved_whole(cfg: Config, name: str) -> bool:
    """Whether modules_to_save may mean a parameter."""
    return any(f".{module.rpartition('.')[2]}." in f".{name}" for module in cfg.modules_to_save)


def _adapter_parameters(shapes: Mapping[str, Shape], rank: int) -> int:
    """The parameters of adapters on every matrix between embedding and head, an upper bound."""
    total = 0
    for name, shape in shapes.items():
        if len(shape) >= 2 and name.startswith("model.layers."):
            total += math.prod(shape[:-2]) * rank * (shape[-2] + shape[-1])
    return total


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # which is 1e+03 in three digits
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
