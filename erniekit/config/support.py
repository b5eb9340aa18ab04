"""What a configuration asks for that this version cannot do, and what it says that does nothing here."""

import dataclasses
from collections.abc import Iterable, Iterator

from erniekit.config.compat import DATA, RUN, Detail, Later, NoEffect
from erniekit.config.compat_keys import RULES
from erniekit.config.schema import Config
from erniekit.config.schema_lora import LoraArgs
from erniekit.config.schema_preference import ALIASES, AVERAGED, REFERENCE_FREE, PreferenceArgs
from erniekit.config.schema_shape import ShapeArgs
from erniekit.utils.errors import ConfigError

_STAGES = {
    "VL-SFT": "vision-language models",
    "OCR-VL-SFT": "vision-language models",
    "VL-DPO": "vision-language models",
    "VL-PT": "vision-language models",
}
_COMPUTE = {
    "fp16": "fp16 training with loss scaling",
    "fp8": "FP8",
}
# Keys that only one kind of training data reads.
_ONLY_TEXT = (
    "train_dataset_type train_dataset_prob mix_strategy num_samples_each_epoch packing greedy_intokens buffer_size "
    "truncation max_estimate_samples"
).split()
_ONLY_TOKEN_FILES = "input_dir split isolate_documents long_document_min_tokens long_document_weight".split()


def unsupported(cfg: Config, command: str = "train") -> list[str]:
    """What cfg asks of `command` that this version cannot do yet: one line each with key, value and feature."""
    found: list[str] = []
    if cfg.stage in _STAGES and command in ("train", "eval"):
        found.append(f"stage: {cfg.stage} ({_STAGES[cfg.stage]}); this version has SFT, PT and DPO")
    if cfg.compute_type in _COMPUTE and command in RUN:
        kind = _COMPUTE[cfg.compute_type]
        found.append(f"compute_type: {cfg.compute_type} ({kind}); this version has bf16 and fp32")
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, Later) and command in rule.commands and rule.asks(value):
            found.append(f"{name}: {value} ({rule.feature})")
    return found


def require_supported(cfg: Config, command: str = "train") -> None:
    """Raises ConfigError that lists what `unsupported` finds."""
    found = unsupported(cfg, command)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ConfigError(f"{cfg.source or 'the configuration'} asks for what this version cannot do yet:{lines}")


def notes(cfg: Config, command: str) -> list[str]:
    """One line for each key given that does nothing in this run, with the reason."""
    found: list[str] = []
    for name, value in cfg.extras:
        rule = RULES[name]
        if isinstance(rule, NoEffect):
            found.append(f"{name}: no effect: {rule.why}")
        elif isinstance(rule, Detail):
            found.append(f"{name}: no effect: read only with {rule.of}, which this version does not have")
        elif isinstance(rule, Later) and rule.asks(value) and command not in rule.commands:
            found.append(f"{name}: no effect: `{command}` does not need it")
        elif isinstance(rule, Later) and rule.otherwise and not rule.asks(value):
            found.append(f"{name}: no effect: {rule.otherwise}")
    found += _other_data(cfg, command)
    found += _one_process(cfg, command)
    found += _shape(cfg, command)
    found += _lora(cfg, command)
    found += _preference(cfg, command)
    found += _overruled(cfg, command)
    return found


def _overruled(cfg: Config, command: str) -> Iterator[str]:
    """Keys that another key makes pointless."""
    if cfg.logging_dir and cfg.report_to == "none" and command == "train":
        yield "logging_dir: no effect: report_to is none; metrics.jsonl and loss.png go to output_dir"
    if command == "train":
        yield from _recompute(cfg)
    if cfg.dropout_warmup_steps and not cfg.attention_probs_dropout_prob and command == "train":
        yield "dropout_warmup_steps: no effect: attention_probs_dropout_prob is 0"
    if cfg.warmup_steps and cfg.warmup_ratio:
        yield f"warmup_ratio: no effect: warmup_steps: {cfg.warmup_steps} decides"


def _recompute(cfg: Config) -> Iterator[str]:
    names = ("recompute_granularity", "use_recompute_moe", "use_recompute_mtp", "no_recompute_layers")
    given = _given(cfg, names)
    if not cfg.recompute and given:
        yield f"{', '.join(given)}: no effect: recompute is False"
    elif cfg.recompute and cfg.use_recompute_moe and cfg.recompute_granularity in ("full", "moe"):
        yield f"use_recompute_moe: no effect: recompute_granularity: {cfg.recompute_granularity} recomputes them anyway"
    if cfg.recompute and cfg.use_recompute_mtp and not cfg.num_nextn_predict_layers:
        yield "use_recompute_mtp: no effect: num_nextn_predict_layers is 0"


def _given(cfg: Config, names: Iterable[str]) -> list[str]:
    """Those of the keys that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    return [name for name in names if vars(cfg)[name] != defaults[name]]


def _one_process(cfg: Config, command: str) -> list[str]:
    """Degrees above 1 for a command that runs in one process, and what only several tensor ranks do."""
    degrees = [name for name in vars(cfg) if name.endswith(("_parallel_degree", "_pp_degree")) and vars(cfg)[name] > 1]
    if degrees and command != "train":
        return [f"{', '.join(degrees)}: no effect: `{command}` runs in one process, and one device holds the model"]
    if command != "train":
        return []
    found = []
    if cfg.sequence_parallel and cfg.tensor_parallel_degree <= 1:
        found.append("sequence_parallel: no effect: tensor_parallel_degree is 1")
    pipeline = _given(cfg, ("pp_seg_method", "pipeline_schedule")) if cfg.pipeline_parallel_degree <= 1 else []
    if pipeline:
        found.append(f"{', '.join(pipeline)}: no effect: pipeline_parallel_degree is 1")
    if cfg.elastic and not cfg.max_restarts:
        found.append("elastic: no effect: max_restarts is 0")
    return found


def _lora(cfg: Config, command: str) -> list[str]:
    """Keys of adapters where none are trained, and what adapters make pointless."""
    if command != "train":
        return []
    if cfg.fine_tuning == "LoRA":
        return ["save_format: no effect: adapters are saved in PEFT's format"] if cfg.save_format != "pt" else []
    given = _given(cfg, (field.name for field in dataclasses.fields(LoraArgs)))
    return [f"{', '.join(given)}: no effect: read only with fine_tuning: LoRA"] if given else []


def _shape(cfg: Config, command: str) -> list[str]:
    """The model's shape where a model is used, which has one."""
    given = _given(cfg, (field.name for field in dataclasses.fields(ShapeArgs))) if command != "train" else []
    return [f"{', '.join(given)}: no effect: `{command}` reads the model's config.json"] if given else []


# What a stage: DPO run does not do, and why.
_NOT_IN_DPO = {
    "num_nextn_predict_layers": "preference losses have no part for tokens further ahead",
    "token_balance_loss": "every pair weighs the same",
    "z_loss_lambda": "it belongs to the next-token loss",
}


def _preference(cfg: Config, command: str) -> list[str]:
    """Keys of preference data and losses in other stages, and what those losses make pointless."""
    if command not in DATA:
        return []
    if cfg.stage == "DPO":
        found = [f"{name}: no effect: stage DPO: {_NOT_IN_DPO[name]}" for name in _given(cfg, _NOT_IN_DPO)]
        found += [
            f"{name}: no effect: read only with loss_type: {loss}"
            for name, loss in (("simpo_gamma", "simpo"), ("dpop_lambda", "dpop"))
            if cfg.loss_type != loss and _given(cfg, [name])
        ]
        if cfg.loss_type in ("or", "orpo") and _given(cfg, ["beta"]):
            found.append(
                f"beta: no effect on the loss: loss_type: {cfg.loss_type} has none; only rewards are told in it"
            )
        return [*found, *_reference(cfg)]
    given = _given(cfg, (field.name for field in dataclasses.fields(PreferenceArgs)))
    return [f"{', '.join(given)}: no effect: read only with stage: DPO"] if given else []


def _reference(cfg: Config) -> Iterator[str]:
    """Keys about a reference that the loss does not have, or that cannot move, and about lengths."""
    why, loss = "", ALIASES.get(cfg.loss_type, cfg.loss_type)
    if cfg.reference_free or loss in REFERENCE_FREE:
        why = f"loss_type: {cfg.loss_type} with reference_free: {cfg.reference_free} has no reference"
        if cfg.ref_logps_cache:
            yield f"ref_logps_cache: no effect: {why}"
    elif cfg.fine_tuning == "LoRA":
        why = "the reference is the model without its adapter"
    if why and cfg.ref_model_update_steps > 0:
        yield f"ref_model_update_steps: no effect: {why}"
    if loss in AVERAGED and cfg.normalize_logps:
        yield f"normalize_logps: no effect: loss_type: {cfg.loss_type} averages over tokens by itself"


def _other_data(cfg: Config, command: str) -> list[str]:
    """A line with the keys that the other kind of training data would read; as far as they differ from their
    defaults.
    """
    if command not in DATA:
        return []
    pretrain = cfg.dataset_type == "pretrain"
    if pretrain and cfg.eval_dataset_path:
        return []  # the evaluation's text reads them
    kind, names = ("pretrain", _ONLY_TEXT) if pretrain else (cfg.dataset_type, _ONLY_TOKEN_FILES)
    given = _given(cfg, names)
    return [f"{', '.join(given)}: no effect: not read with dataset_type: {kind}"] if given else []
