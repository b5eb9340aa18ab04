"""Reports keys that another key, or the model, makes pointless: one table of (keys, condition, reason).

Only keys that the user gave are reported, in one line for all keys with the same reason. A switch that is off, or a
number at a default that means off, requests nothing and is not reported.
"""

from collections.abc import Callable, Sequence
from functools import partial

from erniekit.config.compat import DATA, RUN
from erniekit.config.methods import BUILT, METHODS, MethodFacts, join_names, option_names
from erniekit.config.pointless_benchmark import BENCHMARK_RULES
from erniekit.config.pointless_fp8 import FP8_RULES
from erniekit.config.pointless_optimizer import OPTIMIZER_RULES
from erniekit.config.pointless_preference import PREFERENCE_RULES
from erniekit.config.pointless_qat import QAT_RULES
from erniekit.config.pointless_quantization import QUANTIZATION_RULES
from erniekit.config.pointless_report import REPORT_RULES
from erniekit.config.pointless_rewards import REWARD_RULES
from erniekit.config.pointless_rl import RL_RULES
from erniekit.config.pointless_rule import USE, Facts, Rule, always
from erniekit.config.pointless_schedule import SCHEDULE_RULES
from erniekit.config.schema import Config, fields
from erniekit.config.schema_lora import LoraArgs
from erniekit.config.schema_mixture import MixtureArgs
from erniekit.config.schema_model import MoEArgs
from erniekit.config.schema_parts import FREEZE_VISION
from erniekit.config.schema_shape import ShapeArgs
from erniekit.config.schema_use import ChatArgs, ExportArgs, GenerateArgs, ServerArgs
from erniekit.config.schema_vision import VisionArgs


def never_read(command: str) -> set[str]:
    """The keys that rules say `command` never reads, whatever the configuration."""
    return {key for rule in RULES if rule.when is always and command in rule.commands for key in rule.keys.split()}


def notes(cfg: Config, command: str, facts: Facts | None = None) -> list[str]:
    """One line per reason, with the given keys that have no effect in `command` for that reason. With `facts`, only the
    lines that follow from these facts.
    """
    before = _reasons(cfg, command, Facts())
    if facts is None:
        reason_of_key = before
    else:
        reason_of_key = {name: reason for name, reason in _reasons(cfg, command, facts).items() if name not in before}
    reasons: dict[str, list[str]] = {}
    for name, reason in reason_of_key.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: no effect: {reason}" for reason, names in reasons.items()]


def _reasons(cfg: Config, command: str, facts: Facts) -> dict[str, str]:
    """Each pointless key with its reason; the first rule that applies gives the reason."""
    reason_of_key: dict[str, str] = {}
    for rule in RULES:
        if command in rule.commands and rule.when(cfg, facts):
            why = rule.why.format_map(vars(cfg) | {"command": command})
            for name in rule.keys.split():
                if is_requested(cfg, name):
                    reason_of_key.setdefault(name, why)
    return reason_of_key


def is_requested(cfg: Config, name: str) -> bool:
    """Whether the user gave a key with a value that requests something."""
    field, value = _FIELDS[name], vars(cfg)[name]
    is_off = value in (None, False, "", (), 0, field.metadata["off"]) or (name in _DEGREES.split() and value == 1)
    return name in cfg.given and not (is_off and value == field.default)


_FIELDS = fields()


def _names(group: type) -> str:
    return " ".join(option_names(group))


def _only_token_files(cfg: Config) -> bool:
    """Whether all data, including that of the evaluation, comes from token files."""
    return cfg.dataset_type == "pretrain" and not cfg.eval_dataset_path


def _generates(cfg: Config) -> bool:
    """Whether the method makes texts of its own when it trains."""
    return "temperature" in cfg.method.also_reads


def _scores_prompts(cfg: Config) -> bool:
    """Whether an evaluation generates completions of prompts and scores them."""
    return cfg.method.reads("reward_funcs") and cfg.eval_benchmark is None


def _has_completion_length(cfg: Config) -> bool:
    """Whether max_completion_length does not come from max_new_tokens (rl_keys.complete)."""
    return "max_completion_length" in cfg.given or cfg.max_completion_length != cfg.max_new_tokens


def _trains_without(key: str) -> Callable[[Config, Facts], bool]:
    """A condition: the method makes no texts when it trains, and does not read this key of generation."""
    return lambda cfg, facts: key not in cfg.method.also_reads and not _generates(cfg)


_DEGREES = (
    "tensor_parallel_degree pipeline_parallel_degree virtual_pp_degree expert_parallel_degree data_parallel_degree "
    "sharding_parallel_degree context_parallel_degree"
)

_DATA_RULES = [
    Rule(
        "train_dataset_type train_dataset_prob mix_strategy num_samples_each_epoch packing greedy_intokens buffer_size "
        "truncation max_estimate_samples on_bad_line",
        lambda c, f: _only_token_files(c),
        "not read with dataset_type: {dataset_type}",
        DATA,
    ),
    Rule(
        "dataloader_num_workers",
        lambda c, f: _only_token_files(c),
        "token files need no encoding; a thread reads them",
        DATA,
    ),
    Rule(
        "input_dir split isolate_documents long_document_min_tokens long_document_weight",
        lambda c, f: c.dataset_type != "pretrain",
        "not read with dataset_type: {dataset_type}",
        DATA,
    ),
    Rule(
        "train_dataset_prob",
        lambda c, f: c.mix_strategy == "concat" and len(c.train_dataset_path) > 1,
        "mix_strategy: concat reads every data set once",
    ),
    Rule(
        "eval_dataset_prob",
        lambda c, f: len(c.eval_dataset_path) > 1,
        "evaluation reads every data set once",
        DATA,
    ),
    Rule(
        "eval_dataset_type eval_dataset_prob",
        lambda c, f: not c.eval_dataset_path,
        "eval_dataset_path is not given",
        DATA,
    ),
    Rule("num_samples_each_epoch", lambda c, f: c.mix_strategy != "random", "read only with mix_strategy: random"),
    Rule("greedy_intokens buffer_size", lambda c, f: not c.packing, "packing is False", DATA),
    Rule(
        "text_dataset_type text_dataset_prob modality_ratio modality_interleave",
        lambda c, f: c.method.vision and not c.text_dataset_path,
        "text_dataset_path is empty",
    ),
    Rule(
        "text_dataset_prob",
        lambda c, f: c.mix_strategy == "concat" and len(c.text_dataset_path) > 1,
        "mix_strategy: concat reads every data set once",
    ),
    Rule(
        "buffer_size",
        lambda c, f: c.packing and not c.greedy_intokens,
        "greedy_intokens: False packs samples in order, as they come",
        DATA,
    ),
    Rule(
        "max_estimate_samples",
        lambda c, f: c.max_steps > 0 and "epoch" not in (c.evaluation_strategy, c.save_strategy),
        "max_steps: {max_steps} decides, so the length of an epoch is not needed",
    ),
]

_RUN_RULES = [
    Rule("num_train_epochs", lambda c, f: c.max_steps > 0, "max_steps: {max_steps} decides how long the training is"),
    Rule(
        "eval_steps",
        lambda c, f: c.evaluation_strategy != "steps",
        "evaluation_strategy is {evaluation_strategy}, not steps",
    ),
    Rule(
        "eval_dataset_path eval_dataset_type eval_dataset_prob max_evaluate_steps",
        lambda c, f: not c.do_eval,
        "nothing is evaluated: evaluation_strategy is no and do_eval is False",
    ),
    Rule(
        "metric_for_best_model greater_is_better",
        lambda c, f: c.evaluation_strategy == "no",
        "evaluation_strategy is no, so there are no evaluations to compare",
    ),
    Rule("save_steps", lambda c, f: c.save_strategy != "steps", "save_strategy is {save_strategy}, not steps"),
    Rule(
        "save_total_limit use_async_save ignore_save_lr_and_optim ckpt_quant_stage",
        lambda c, f: c.save_strategy == "no",
        "save_strategy is no, so there are no checkpoints",
    ),
    Rule(
        "ckpt_quant_stage",
        lambda c, f: c.ignore_save_lr_and_optim,
        "ignore_save_lr_and_optim is True, so checkpoints hold no moments",
    ),
    Rule(
        "ignore_load_lr_and_optim ignore_data_skip",
        lambda c, f: c.resume_from_checkpoint == "none",
        "resume_from_checkpoint is none",
    ),
    Rule(
        "ignore_load_lr_and_optim ignore_data_skip",
        lambda c, f: c.overwrite_output_dir and c.resume_from_checkpoint == "auto",
        "overwrite_output_dir: True removes the run that would be resumed",
    ),
    Rule("save_format", lambda c, f: c.fine_tuning == "LoRA", "adapters are saved in PEFT's format"),
    *(
        Rule(key, _trains_without(key), "`{command}` generates no text; read by eval and chat")
        for key in option_names(GenerateArgs)
    ),
    Rule(
        " ".join(
            key for key in option_names(GenerateArgs) if not any(key in facts.also_reads for facts in METHODS.values())
        ),
        lambda c, f: _generates(c),
        "stage {stage} makes its texts without it; read by eval and chat",
    ),
    Rule(
        "max_new_tokens",
        lambda c, f: c.method.reads("max_completion_length") and _has_completion_length(c),
        "max_completion_length bounds the completions; read by eval and chat",
    ),
    Rule("predict_with_generate", always, "`{command}` generates no text; read by eval and chat"),
    Rule(_names(GenerateArgs) + " predict_with_generate", always, "`{command}` generates no text", ("split",)),
    Rule(
        _names(GenerateArgs) + " predict_with_generate",
        lambda c, f: not c.quantization_eval,
        "`export` generates text only with quantization_eval: True",
        ("export",),
    ),
    Rule("predict_with_generate", always, "read only by eval", ("chat", "server")),
    Rule(_names(ChatArgs), always, "read only by chat", ("train", "eval", "server", "export", "split")),
    Rule(_names(ServerArgs), always, "read only by server", ("train", "eval", "chat", "export", "split")),
    Rule("eval_output", always, "read only by eval", ("train", "chat", "server", "export", "split")),
    Rule("checkpoint", always, "read only by eval, export, split, chat and server"),
    Rule(_names(ExportArgs), always, "read only by export and split", ("train", "eval", "chat", "server")),
    Rule("format", always, "`split` keeps the layout of what it reads; `convert` changes it", ("split",)),
]

_OPTIMIZER_RULES = [
    *SCHEDULE_RULES,
    Rule("neftune_noise_alpha", lambda c, f: not c.neftune, "neftune is False; neftune: true switches the noise on"),
    Rule(
        "batch_size_warmup_steps",
        lambda c, f: c.gradient_accumulation_steps == 1,
        "gradient_accumulation_steps is 1, so there is nothing to grow to",
    ),
    Rule(
        "moe_gate_lr_ratio moe_orthogonal_loss_lambda",
        lambda c, f: c.fine_tuning == "LoRA",
        "fine_tuning: LoRA trains no routers",
    ),
    *FP8_RULES,
    *QAT_RULES,
    Rule("profile_step_start profile_step_end", lambda c, f: not c.profile, "only read with profile: true"),
    Rule("emulate_precision matmul_precision scale_loss", always, "read only by train", USE),
    Rule("scale_loss", lambda c, f: c.compute_type != "fp16", "compute_type: {compute_type} needs no loss scaling"),
    Rule("amp_master_grad", lambda c, f: c.compute_type == "fp32", "with compute_type: fp32 gradients are fp32 anyway"),
    Rule(
        "multi_token_pred_lambda",
        lambda c, f: not c.num_nextn_predict_layers,
        "num_nextn_predict_layers is 0",
    ),
]

_VISION_RULES = [
    Rule("adaptive_max_imgtoken_option adaptive_max_imgtoken_rate", always, "read only by train", USE),
    Rule(
        "vision_experts_from_text vision_experts_down_scale",
        lambda c, f: c.method.vision and not c.vision_config_path,
        "vision_config_path is not given",
        DATA,
    ),
    Rule("vision_experts_down_scale", lambda c, f: not c.vision_experts_from_text, "vision_experts_from_text is False"),
    Rule(
        "video_fps video_min_frames video_max_frames",
        lambda c, f: (c.video_target_frames or -1) > 0,
        "video_target_frames: {video_target_frames} decides",
        RUN,
    ),
    Rule("vit_lr_ratio visual_ld resampler_lr_ratio", lambda c, f: f.sees_pictures is False, "the model has no vision"),
    Rule(
        "vit_lr_ratio visual_ld",
        lambda c, f: c.fine_tuning == "LoRA" and not (c.lora_target_modules or c.lora_path),
        "LoRA adapts the vision transformer only where lora_target_modules names it",
    ),
    Rule(
        "vit_lr_ratio visual_ld",
        lambda c, f: FREEZE_VISION in c.freeze_config or "vision_transformer" in c.frozen_parameters,
        "the vision transformer is frozen",
    ),
    Rule("visual_ld", lambda c, f: c.vit_lr_ratio is not None, "vit_lr_ratio: {vit_lr_ratio} decides"),
    Rule("resampler_lr_ratio", lambda c, f: "resampler" in c.frozen_parameters, "the resampler is frozen"),
]

_MODEL_RULES = [
    Rule(
        "recompute_granularity recompute_modules offload_activations use_recompute_moe use_recompute_mtp "
        "no_recompute_layers",
        lambda c, f: not c.recompute,
        "recompute is False",
    ),
    Rule(
        "recompute_modules",
        lambda c, f: c.recompute and c.recompute_granularity != "selective",
        "recompute_granularity: {recompute_granularity} decides; selective would read it",
    ),
    Rule(
        "use_recompute_moe",
        lambda c, f: c.recompute and c.recompute_granularity in ("full", "moe"),
        "recompute_granularity: {recompute_granularity} recomputes them anyway",
    ),
    Rule(
        "use_recompute_moe",
        lambda c, f: c.recompute and c.recompute_granularity == "selective" and "moe" in c.recompute_modules,
        "recompute_modules names moe",
    ),
    Rule(
        "use_recompute_mtp",
        lambda c, f: c.recompute and not c.num_nextn_predict_layers,
        "num_nextn_predict_layers is 0",
    ),
    Rule(_names(LoraArgs), lambda c, f: c.fine_tuning != "LoRA", "read only with fine_tuning: LoRA"),
    Rule(
        "lora_rank lora_alpha rslora rslora_plus use_dora lora_target_modules modules_to_save",
        lambda c, f: c.fine_tuning == "LoRA" and bool(c.lora_path),
        "the adapter of lora_path has its own rank, scaling and targets",
    ),
    Rule(
        "dropout_warmup_steps",
        lambda c, f: not c.attention_probs_dropout_prob,
        "attention_probs_dropout_prob is 0",
    ),
    Rule(_names(ShapeArgs), always, "`{command}` reads the model's config.json", ("export", "split")),
    Rule(_names(ShapeArgs), lambda c, f: c.continue_training, "`{command}` reads the model's config.json", USE),
    Rule(_names(MoEArgs), lambda c, f: f.num_experts == 0, "the model has no experts"),
    Rule(
        "moe_use_aux_free_update_coef",
        lambda c, f: c.moe_use_aux_free is False or (c.moe_use_aux_free is None and f.aux_free is False),
        "the router's correction bias does not move: moe_use_aux_free is off",
    ),
]


def _has_method(method: MethodFacts, cfg: Config, facts: Facts) -> bool:
    return cfg.method is method


def _does_not_read(key: str, cfg: Config, facts: Facts) -> bool:
    return not cfg.method.reads(key)


def _has_no_pictures(cfg: Config, facts: Facts) -> bool:
    return not cfg.method.vision


def _mixes_nothing(cfg: Config, facts: Facts) -> bool:
    """Whether there are no pictures to mix text with, and the text did not become the training data either."""
    return not cfg.method.vision and cfg.train_dataset_path != cfg.text_dataset_path


def _method_rules() -> list[Rule]:
    """The rules that follow from the method table: keys that a method does not read, and options of other methods."""
    rules = []
    for facts in METHODS.values():
        for key, why in facts.unread.items():
            rules.append(Rule(key, partial(_has_method, facts), f"stage {facts.name}: {why}", DATA))
    for group in dict.fromkeys(group for facts in METHODS.values() for group in facts.options):
        rules += [
            Rule(name, partial(_does_not_read, name), _only_readers([name]), DATA) for name in option_names(group)
        ]
    for group, is_idle in ((VisionArgs, _has_no_pictures), (MixtureArgs, _mixes_nothing)):
        rules.append(Rule(_names(group), is_idle, _only_readers(option_names(group)), DATA))
    return rules


def _only_readers(keys: Sequence[str]) -> str:
    """The reason that names the methods which read some of these keys."""
    names = [name for name in BUILT if any(METHODS[name].reads(key) for key in keys)]
    return f"read only with stage: {join_names(names, 'or')}"


METHOD_RULES = _method_rules()  # keys that the method of the configuration does not read

_RANK_RULES = [
    Rule(
        _DEGREES,
        always,
        "`{command}` streams tensor by tensor in one process and needs no parallel degrees",
        ("export", "split"),
    ),
    Rule(
        "data_parallel_degree sharding_parallel_degree balance_pictures",
        always,
        "a conversation needs one copy of the model",
        ("chat", "server"),
    ),
    Rule("context_parallel_degree", always, "every data rank has whole rows in `{command}`", USE),
    Rule("cp_comm_type", lambda c, f: c.context_parallel_degree <= 1, "context_parallel_degree is 1"),
    Rule("sequence_parallel", lambda c, f: c.tensor_parallel_degree <= 1, "tensor_parallel_degree is 1"),
    Rule(
        "pp_seg_method pipeline_schedule",
        lambda c, f: c.pipeline_parallel_degree <= 1,
        "pipeline_parallel_degree is 1",
    ),
    Rule("elastic", lambda c, f: not c.max_restarts, "max_restarts is 0"),
    Rule("max_restarts elastic", always, "`{command}` has no checkpoints to start again from", USE),
    Rule("balance_pictures", lambda c, f: not c.method.vision, "the method reads no pictures"),
    Rule("sharding balance_pictures", lambda c, f: f.data_ranks == 1, "there is one data rank"),
    Rule(
        "check_replicas_steps distributed_timeout rendezvous_timeout",
        lambda c, f: f.ranks == 1,
        "one process trains",
    ),
]

_USE_RULES = [
    Rule(
        "min_tokens temperature top_p top_k frequency_penalty presence_penalty",
        lambda c, f: _scores_prompts(c),
        "an evaluation of stage {stage} takes the likeliest tokens",
        ("eval",),
    ),
    Rule(
        "max_new_tokens",
        lambda c, f: _scores_prompts(c) and _has_completion_length(c),
        "max_completion_length bounds the completions",
        ("eval",),
    ),
    Rule(
        _names(GenerateArgs),
        lambda c, f: not (c.predict_with_generate or c.eval_benchmark or _scores_prompts(c)),
        "predict_with_generate is False",
        ("eval",),
    ),
    Rule("stream", always, "`eval` prints no answers", ("eval",)),
    Rule("stream", always, "each request says whether its answer is streamed", ("server",)),
    Rule(
        "image_search_dir",
        lambda c, f: "image_search" not in c.chat_tools,
        "chat_tools does not have image_search",
        ("chat",),
    ),
    Rule("box_coordinates missing_media_tags", always, "`{command}` reads no records", ("chat", "server")),
    Rule("max_tool_rounds", lambda c, f: not c.chat_tools, "chat_tools is empty", ("chat",)),
    Rule(
        "top_p top_k",
        lambda c, f: c.temperature == 0,
        "temperature: 0 always takes the likeliest token",
        USE,
    ),
]

RULES: list[Rule] = [
    *_DATA_RULES,
    *_RUN_RULES,
    *QUANTIZATION_RULES,
    *BENCHMARK_RULES,
    *REPORT_RULES,
    *OPTIMIZER_RULES,
    *_OPTIMIZER_RULES,
    *_VISION_RULES,
    *_MODEL_RULES,
    *METHOD_RULES,
    *PREFERENCE_RULES,
    *RL_RULES,
    *REWARD_RULES,
    *_RANK_RULES,
    *_USE_RULES,
]
