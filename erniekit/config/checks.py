"""Checks over several keys at once: what no single key can say about itself.

Each yields its complaints as "key: what is wrong, and what to do".
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from erniekit.config.compat import DATA
from erniekit.config.methods import METHODS
from erniekit.config.schema import Config
from erniekit.config.schema_preference import ALIASES, SMOOTHED
from erniekit.config.schema_shape import NEEDED, NEEDED_OF_EXPERTS, ShapeArgs
from erniekit.config.values import split_list, split_patterns

LOW_BIT = ("wint8", "wint4", "wint4/8", "nf4")
SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "wsd")
_SUM_ROOM = 0.02  # so that "0.33,0.33,0.33" will do


def problems(cfg: Config, command: str) -> list[str]:
    """Everything that cannot be as it stands, for `command`."""
    found = [*_schedule(cfg), *_datasets(cfg), *_numbers(cfg), *_needed(cfg, command), *_token_files(cfg, command)]
    if command == "train":
        found += [*_training(cfg), *_shape(cfg), *_low_bit(cfg), *_lora(cfg), *_preference(cfg), *_best(cfg)]
    return found


def _schedule(cfg: Config) -> Iterator[str]:
    name, colon, steps = cfg.lr_scheduler_type.partition(":")
    if name not in SCHEDULES or (colon and name != "wsd"):
        yield f"lr_scheduler_type: expected one of {', '.join(SCHEDULES)} (wsd:N), got {cfg.lr_scheduler_type!r}"
    elif colon and not (steps.isascii() and steps.isdigit()):
        yield (
            "lr_scheduler_type: wsd takes the step up to which the rate is steady, as in wsd:1000, got "
            f"{cfg.lr_scheduler_type!r}"
        )
    if cfg.min_lr > cfg.learning_rate:
        yield f"min_lr: {cfg.min_lr:g} is more than learning_rate: {cfg.learning_rate:g}"


def _datasets(cfg: Config) -> Iterator[str]:
    for split in ("train", "eval"):
        paths, types, probs = (split_list(vars(cfg)[f"{split}_dataset_{part}"]) for part in ("path", "type", "prob"))
        if paths and any(given and len(given) != len(paths) for given in (types, probs)):
            counts = f"{len(paths)} paths, {len(probs)} probs, {len(types)} types"
            yield f"{split}_dataset_path: The len of dataset path, prob, type are inconsistent: {counts}"
            continue
        try:
            shares = [float(text) for text in probs]
        except ValueError:
            yield f"{split}_dataset_prob: expected numbers, got {','.join(probs)!r}"
            continue
        if any(not 0 < share < math.inf for share in shares):
            yield f"{split}_dataset_prob: each share must be more than 0, got {','.join(probs)}"
        elif shares and split == "train" and cfg.mix_strategy != "concat" and abs(sum(shares) - 1) > _SUM_ROOM:
            total = f"they sum to {sum(shares):g}"
            yield f"train_dataset_prob: shares must sum to 1 with mix_strategy: {cfg.mix_strategy}, {total}"


def _numbers(cfg: Config) -> Iterator[str]:
    if cfg.min_tokens > cfg.max_new_tokens:
        yield f"min_tokens: {cfg.min_tokens} is more than max_new_tokens: {cfg.max_new_tokens}"


def _token_files(cfg: Config, command: str) -> Iterator[str]:
    if cfg.dataset_type != "pretrain" or command not in DATA:
        return
    if not cfg.input_dir:
        yield "input_dir: needed with dataset_type: pretrain; the token files"
    if not cfg.method.token_files:
        readers = " or ".join(name for name, facts in METHODS.items() if facts.token_files)
        yield f"stage: dataset_type: pretrain is for stage: {readers}, got {cfg.method.name}"
    if cfg.train_dataset_path and command == "train":
        yield "train_dataset_path: dataset_type: pretrain trains on input_dir; remove one of the two"
    if cfg.long_document_weight > 1 and cfg.long_document_min_tokens is None:
        yield f"long_document_min_tokens: needed with long_document_weight: {cfg.long_document_weight}"


def _needed(cfg: Config, command: str) -> Iterator[str]:
    model = cfg.checkpoint or cfg.output_dir or cfg.model_name_or_path
    token_files = cfg.dataset_type == "pretrain"
    other_data = any(name == "text_dataset_path" and value for name, value in cfg.extras)  # of a refused stage
    needs = (
        (
            "train",
            cfg.model_name_or_path or shape_given(cfg),
            "model_name_or_path: needed; a model directory or a Hub name",
        ),
        (
            "eval export split chat",
            model,
            f"model_name_or_path: `{command}` needs a model: give checkpoint, output_dir or model_name_or_path",
        ),
        ("train export split", cfg.output_dir, "output_dir: needed; where the results go"),
        ("eval", cfg.eval_output or cfg.output_dir, "eval_output: needed; where the results go (or output_dir)"),
        ("train", cfg.train_dataset_path or token_files or other_data, "train_dataset_path: needed; the training data"),
        ("eval", cfg.eval_dataset_path or token_files, "eval_dataset_path: needed; the data to evaluate on"),
    )
    for commands, value, message in needs:
        if command in commands.split() and not value:
            yield message


def _training(cfg: Config) -> Iterator[str]:
    if not cfg.do_train:
        yield "do_train: False leaves `erniekit train` nothing to do; to evaluate only, use `erniekit eval`"
    if cfg.mix_strategy == "random" and cfg.max_steps <= 0:
        yield "max_steps: mix_strategy: random has no end, so max_steps must be more than 0 (or mix_strategy: concat)"
    if cfg.do_eval and not cfg.eval_dataset_path and cfg.dataset_type != "pretrain":
        strategy = cfg.evaluation_strategy
        asked = "do_eval: True" if strategy == "no" else f"evaluation_strategy: {strategy}"
        yield f"eval_dataset_path: needed with {asked}"


def shape_given(cfg: Config) -> dict[str, int | float | bool]:
    """The keys of the model's shape that are given."""
    values = {field.name: vars(cfg)[field.name] for field in dataclasses.fields(ShapeArgs)}
    return {name: value for name, value in values.items() if value is not None}


def _shape(cfg: Config) -> Iterator[str]:
    """A model that the YAML alone describes."""
    given = shape_given(cfg)
    if cfg.model_name_or_path or not given:
        return
    needed = [*NEEDED, *(NEEDED_OF_EXPERTS if cfg.moe_num_experts else [])]
    missing = [name for name in needed if name not in given]
    if missing:
        yield (
            f"{missing[0]}: a model without model_name_or_path needs its whole shape; missing: {', '.join(missing)}. "
            "Or give model_name_or_path, a directory with a config.json"
        )
    if cfg.continue_training:
        yield "continue_training: a shape without model_name_or_path has no weights; set continue_training: false"
    if not cfg.tokenizer_name_or_path:
        yield "tokenizer_name_or_path: needed with a shape and no model_name_or_path; the tokenizer's directory"


def _low_bit(cfg: Config) -> Iterator[str]:
    if cfg.compute_type in LOW_BIT and cfg.fine_tuning != "LoRA":
        yield (
            f"compute_type: {cfg.compute_type}: the base is held in 8 or 4 bits and frozen, but fine_tuning: "
            f"{cfg.fine_tuning} trains it: set fine_tuning: LoRA, or compute_type: bf16"
        )


def _lora(cfg: Config) -> Iterator[str]:
    for target in split_patterns(cfg.lora_target_modules):
        try:
            re.compile(target)
        except re.error as error:
            yield f"lora_target_modules: {target!r} is no regular expression: {error}"
    if cfg.fine_tuning != "LoRA":
        if cfg.lora_path:
            yield (
                f"lora_path: {cfg.lora_path} with fine_tuning: {cfg.fine_tuning}: set fine_tuning: LoRA, or export the "
                "adapter first and train the merged model"
            )
        return
    if not cfg.continue_training:
        yield "continue_training: fine_tuning: LoRA adapts trained weights; with a random start use fine_tuning: Full"
    if cfg.num_nextn_predict_layers:
        yield (
            f"num_nextn_predict_layers: {cfg.num_nextn_predict_layers}: fine_tuning: LoRA does not train multi-token "
            "prediction: set it to 0 (the model's own blocks are kept as they are)"
        )
    if cfg.use_dora and cfg.tensor_parallel_degree > 1:
        yield (
            f"use_dora: not with tensor_parallel_degree: {cfg.tensor_parallel_degree}: "
            "no rank has whole columns of all weights. Use data or pipeline parallelism, or use_dora: False"
        )


def _preference(cfg: Config) -> Iterator[str]:
    if not cfg.method.reads("loss_type"):
        return
    loss = ALIASES.get(cfg.loss_type, cfg.loss_type)
    if cfg.label_smoothing and loss not in SMOOTHED:
        yield f"label_smoothing: loss_type {cfg.loss_type} has none; it is for {', '.join(SMOOTHED)}"
    if loss == "exo_pair" and not cfg.label_smoothing:
        yield f"label_smoothing: loss_type {cfg.loss_type} needs one above 0; its paper takes 1e-3"
    if cfg.offset_alpha:
        if cfg.loss_type != "sigmoid":
            yield f"offset_alpha: only for loss_type sigmoid, not {cfg.loss_type}"
        types = {*split_list(cfg.train_dataset_type), *split_list(cfg.eval_dataset_type if cfg.do_eval else None)}
        if types - {"erniekit"}:
            yield "offset_alpha: needs the scores (`sort`) that only data of type erniekit has"
    if not cfg.pref_loss_ratio and not cfg.sft_loss_ratio and cfg.loss_type != "orpo":
        yield "pref_loss_ratio: 0, and sft_loss_ratio: 0: nothing is left to train on"
    if cfg.ref_logps_cache and cfg.ref_model_update_steps > 0:
        yield "ref_logps_cache: a reference that changes (ref_model_update_steps) cannot be computed beforehand"


def _best(cfg: Config) -> Iterator[str]:
    wants = {
        "load_best_model_at_end": cfg.load_best_model_at_end,
        "early_stopping_patience": cfg.early_stopping_patience is not None,
    }
    for name, wanted in wants.items():
        if wanted and cfg.evaluation_strategy == "no":
            yield f"{name}: needs evaluations to compare: set evaluation_strategy to steps or epoch"
    if cfg.load_best_model_at_end and cfg.save_strategy == "no":
        yield "load_best_model_at_end: needs checkpoints to choose from: set save_strategy to steps or epoch"
