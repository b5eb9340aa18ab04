"""Checks that involve several keys, or that a field's own limits cannot express.

Each check yields its problems in the form "key: what is wrong, and what to do".
"""

import dataclasses
import re
from collections.abc import Iterator

from erniekit.config import context_keys, fields, precision_keys, rl_keys
from erniekit.config.compat import DATA, RUN
from erniekit.config.evaluation_metrics import metrics_of
from erniekit.config.methods import METHODS, Records
from erniekit.config.schema import Config
from erniekit.config.schema_preference import option_problems
from erniekit.config.schema_rewards import reward_problems
from erniekit.config.schema_shape import NEEDED, NEEDED_OF_EXPERTS, ShapeArgs
from erniekit.config.schema_use import LEAST_LEARNED_TEMPERATURE
from erniekit.config.token_files import weighted_prefixes
from erniekit.utils.wording import count_of

# The schemes that each algorithm with calibration serves: SmoothQuant is about activations in 8 bits, and AWQ about
# few bits of weights that no engine rotates.
ALGORITHMS = {
    "gptq": ("wint4", "wint8", "wint4/8", "w8a8", "fp8", "w4a8", "wint2"),
    "awq": ("wint4", "wint8", "wint4/8", "w8a8"),
    "smoothquant": ("w8a8",),
}
SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "wsd")
_SUM_ROOM = 0.02  # tolerance of the sum, so that "0.33,0.33,0.33" is accepted


def problems(cfg: Config, command: str) -> list[str]:
    """Every problem that these checks find in a configuration for `command`."""
    rules = [_schedule(cfg), _datasets(cfg), _mixture(cfg), _numbers(cfg), _needed(cfg, command)]
    if command in DATA:
        rules += [_token_files(cfg, command), _dataset_types(cfg, command), _pictures(cfg), _vision_start(cfg)]
    if command in RUN:
        rules += [_qat(cfg)]
    if command == "eval" or (command == "export" and cfg.quantization_eval):
        rules += [_answers(cfg)]
    if command == "export":
        rules += [_quantization(cfg)]
    if command == "chat":
        rules += [_chat_tools(cfg)]
    if command == "server":
        rules += [_one_process(cfg)]
    if command == "train":
        rules += [
            _training(cfg),
            _elastic(cfg),
            _shape(cfg),
            _pipeline(cfg),
            _sharding(cfg),
            context_keys.problems(cfg),
            precision_keys.problems(cfg),
            _recompute(cfg),
            _qat_training(cfg),
            _expressions(cfg),
            _lora(cfg),
            _preference(cfg),
            rl_keys.problems(cfg),
            _distillation(cfg),
            reward_problems(cfg) if cfg.method.reads("reward_funcs") else iter(()),
            _best(cfg),
        ]
    return [problem for rule in rules for problem in rule]


def _one_process(cfg: Config) -> Iterator[str]:
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"):
        if vars(cfg)[name] > 1:
            yield f"{name}: {vars(cfg)[name]}: `server` runs the model in one process. Leave the key out."


def _schedule(cfg: Config) -> Iterator[str]:
    name, colon, steps = cfg.lr_scheduler_type.partition(":")
    if name not in SCHEDULES or (colon and name != "wsd"):
        meant = fields.hint("lr_scheduler_type", name, SCHEDULES)
        yield (
            f"lr_scheduler_type: expected one of {', '.join(SCHEDULES)} (wsd:N), got {cfg.lr_scheduler_type!r}{meant}"
        )
    elif colon and not (steps.isascii() and steps.isdigit()):
        yield (
            "lr_scheduler_type: wsd takes the step up to which the rate is steady, as in wsd:1000, got "
            f"{cfg.lr_scheduler_type!r}"
        )
    if cfg.profile_step_end < cfg.profile_step_start:
        yield f"profile_step_start: {cfg.profile_step_start} is after profile_step_end: {cfg.profile_step_end}"
    if cfg.min_lr > cfg.learning_rate:
        yield f"min_lr: {cfg.min_lr:g} is more than learning_rate: {cfg.learning_rate:g}"
    if name == "polynomial" and cfg.lr_end > cfg.learning_rate:
        yield f"lr_end: {cfg.lr_end:g} is more than learning_rate: {cfg.learning_rate:g}, which is the highest rate"


def _datasets(cfg: Config) -> Iterator[str]:
    for split in ("train", "text", "eval"):
        paths, types, shares = (vars(cfg)[f"{split}_dataset_{suffix}"] for suffix in ("path", "type", "prob"))
        others = {f"{split}_dataset_type": types, f"{split}_dataset_prob": shares}
        wrong = [f"{name} has {len(values)}" for name, values in others.items() if values and len(values) != len(paths)]
        if paths and wrong:
            yield (
                f"{split}_dataset_path: {count_of(len(paths), 'path')}, but {' and '.join(wrong)}. Give one for each "
                "path, or leave the key out."
            )
        elif shares and split != "eval" and cfg.mix_strategy != "concat" and abs(sum(shares) - 1) > _SUM_ROOM:
            total = f"they sum to {sum(shares):g}"
            yield f"{split}_dataset_prob: shares must sum to 1 with mix_strategy: {cfg.mix_strategy}, {total}"


def _mixture(cfg: Config) -> Iterator[str]:
    if cfg.modality_ratio and len(cfg.modality_ratio) != 2:
        given = ",".join(map(str, cfg.modality_ratio))
        yield f"modality_ratio: {given}: give two numbers, the turns of pictures and the turns of text, such as 1,1"


def _numbers(cfg: Config) -> Iterator[str]:
    if cfg.min_tokens > cfg.max_new_tokens:
        yield f"min_tokens: {cfg.min_tokens} is more than max_new_tokens: {cfg.max_new_tokens}"


def _token_files(cfg: Config, command: str) -> Iterator[str]:
    if cfg.dataset_type != "pretrain":
        return
    if not cfg.input_dir:
        yield 'input_dir: needed with dataset_type: pretrain; the token files, such as "0.4 data/a 0.6 data/b"'
    try:
        weighted_prefixes(cfg.input_dir)
    except ValueError as error:
        yield f"input_dir: {error}"
    if not 1 <= len(cfg.split) <= 3 or not sum(cfg.split):
        yield 'split: expected shares for training, evaluation and test that are not all 0, as in "998,1,1"'
    if not cfg.method.token_files:
        readers = " or ".join(name for name, facts in METHODS.items() if facts.token_files)
        yield f"stage: dataset_type: pretrain is for stage: {readers}, got {cfg.method.name}"
    if cfg.train_dataset_path and command == "train":
        yield "train_dataset_path: dataset_type: pretrain trains on input_dir; remove one of the two"
    if cfg.long_document_weight > 1 and cfg.long_document_min_tokens is None:
        yield f"long_document_min_tokens: needed with long_document_weight: {cfg.long_document_weight}"


# With pictures or not: the types whose records pretraining reads as documents.
_TYPES_OF_DOCUMENTS = {True: ("erniekit", "text"), False: ("erniekit", "text", "messages", "chatml")}


def _dataset_types(cfg: Config, command: str) -> Iterator[str]:
    """Checks that the method reads the formats of the data sets. An unbuilt method is refused by its name alone."""
    if cfg.method.later:
        return
    splits = ["eval"] if command == "eval" or cfg.do_eval else []
    if command == "train":
        splits += ["train", "text"] if cfg.text_dataset_path and cfg.method.reads("text_dataset_path") else ["train"]
    records, stage = cfg.method.records, cfg.method.name
    instead = next(facts.name for facts in METHODS.values() if facts.vision == cfg.method.vision)
    for split in splits:
        for name in dict.fromkeys(vars(cfg)[f"{split}_dataset_type"]):
            if records in (Records.PAIRS, Records.PROMPTS, Records.JUDGED) and name == "text":
                yield (
                    f"{split}_dataset_type: stage: {stage} reads {records.value}, not {name}. Use erniekit, messages, "
                    "sharegpt or alpaca"
                )
            if records is Records.TEXT and name not in _TYPES_OF_DOCUMENTS[cfg.method.vision]:
                yield (
                    f'{split}_dataset_type: stage: {stage} reads plain text ({{"text": ...}}), not {name}. Use '
                    f"erniekit or text, or stage: {instead}"
                )


def _pictures(cfg: Config) -> Iterator[str]:
    for prefix in ("", "video_"):
        least, most = (vars(cfg)[f"{prefix}{bound}_pixels"] for bound in ("min", "max"))
        if least is not None and most is not None and least > most:
            yield f"{prefix}min_pixels: {least} is more than {prefix}max_pixels: {most}"
    fewest, most = cfg.video_min_frames, cfg.video_max_frames
    if fewest is not None and most is not None and fewest > most:
        yield f"video_min_frames: {fewest} is more than video_max_frames: {most}"
    sizes, rates = cfg.adaptive_max_imgtoken_option, cfg.adaptive_max_imgtoken_rate
    if len(sizes) != len(rates):
        yield (
            f"adaptive_max_imgtoken_rate: {count_of(len(rates), 'rate')} for {count_of(len(sizes), 'number')} of "
            "adaptive_max_imgtoken_option; give one for each"
        )
    elif rates and abs(sum(rates) - 1) > _SUM_ROOM:
        yield f"adaptive_max_imgtoken_rate: rates must sum to 1, they sum to {sum(rates):g}"
    wrong, instead = ("cut", "shrink") if cfg.method.vision else ("shrink", "cut")
    if cfg.truncation == wrong:
        what = "pictures are never cut" if cfg.method.vision else "there are no pictures to make smaller"
        yield f"truncation: {wrong}: with stage: {cfg.method.name} {what}. Use drop, {instead} or error"


def _vision_start(cfg: Config) -> Iterator[str]:
    if cfg.vision_config_path is None:
        return
    if not cfg.model_name_or_path or not cfg.continue_training:
        yield (
            "vision_config_path: it adds vision to the weights of a text model, so it needs model_name_or_path and "
            "continue_training: true. For a random start set model_name_or_path to the directory of that config.json"
        )
    if cfg.fine_tuning == "LoRA":
        yield "vision_config_path: fine_tuning: LoRA would not train the new vision part; use fine_tuning: Full"


def _quantization(cfg: Config) -> Iterator[str]:
    algorithm, scheme = cfg.quantization_algorithm, cfg.quantization
    if algorithm == "rtn" or scheme == "none":
        return
    if scheme not in ALGORITHMS[algorithm]:
        schemes = ", ".join(ALGORITHMS[algorithm])
        others = [name for name, known in ALGORITHMS.items() if scheme in known]
        yield (
            f"quantization_algorithm: {algorithm} is for {schemes}, and quantization is {scheme}: "
            f"use {' or '.join([*others, 'rtn'])}"
        )
    if cfg.quantization_calibration_path is None:
        yield (
            f"quantization_calibration_path: quantization_algorithm: {algorithm} needs texts like those of the model's "
            "use: name a data file, or set quantization_algorithm: rtn"
        )


def _answers(cfg: Config) -> Iterator[str]:
    if not cfg.predict_with_generate or cfg.eval_benchmark:
        return
    if cfg.dataset_type == "pretrain" and not cfg.eval_dataset_path:
        yield "predict_with_generate: token files have no questions. Set it to False, or give eval_dataset_path"
    elif cfg.method.records is Records.PROMPTS:
        yield f"predict_with_generate: evaluating stage: {cfg.method.name} answers the prompts anyway. Remove it"
    elif cfg.method.records is Records.TEXT or "text" in cfg.eval_dataset_type:
        yield (
            "predict_with_generate: the evaluation data is plain text, which has no questions. Set it to False, or "
            "evaluate on questions and answers"
        )


def _chat_tools(cfg: Config) -> Iterator[str]:
    if "image_search" in cfg.chat_tools and cfg.image_search_dir is None:
        yield "image_search_dir: needed with chat_tools: image_search; a directory of pictures"


def _pipeline(cfg: Config) -> Iterator[str]:
    stages, chunks = max(cfg.pipeline_parallel_degree, 1), max(cfg.virtual_pp_degree, 1)
    if chunks > 1 and stages == 1:
        yield (
            f"virtual_pp_degree: {chunks} with pipeline_parallel_degree: 1: there is one stage, and nothing to "
            "interleave. Set virtual_pp_degree: 1, or more stages"
        )
    if cfg.pipeline_schedule == "memory_efficient" and chunks == 1 and stages > 1:
        yield (
            "pipeline_schedule: memory_efficient needs at least 2 chunks of the model on a stage. Set "
            "virtual_pp_degree: 2, or pipeline_schedule: 1f1b"
        )
    method = cfg.pp_seg_method
    if isinstance(method, str) and method not in ("uniform", "balanced") and not method.startswith("layer:"):
        yield (
            f"pp_seg_method: expected layer:DecoderLayer (the same number of layers each), balanced (by cost), or the "
            f"layers at which stages begin, such as [0,14,28]; got {method!r}"
        )


def _sharding(cfg: Config) -> Iterator[str]:
    """What stage 3 cannot divide, or would divide wrongly."""
    if cfg.sharding != "stage3":
        return
    instead = "Set sharding: stage2"
    if cfg.compute_type in precision_keys.LOW_BIT:
        yield f"sharding: stage3 does not divide weights in 8 or 4 bits (compute_type: {cfg.compute_type}). {instead}"
    if cfg.fp8 != "none":
        yield f"sharding: stage3 does not divide the FP8 copies of weights (fp8: {cfg.fp8}). {instead}, or fp8: none"
    if cfg.qat != "none":
        yield f"sharding: stage3 is not built for the rounded weights of qat: {cfg.qat}. {instead}, or qat: none"
    if cfg.fine_tuning == "LoRA" and cfg.use_dora:
        yield f"sharding: stage3 does not shard the magnitudes of use_dora. {instead}, or use_dora: False"


def _needed(cfg: Config, command: str) -> Iterator[str]:
    model = cfg.checkpoint or cfg.output_dir or cfg.model_name_or_path
    token_files = cfg.dataset_type == "pretrain"
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
        ("train", cfg.train_dataset_path or token_files, "train_dataset_path: needed; the training data"),
        (
            "eval",
            cfg.eval_dataset_path or token_files or cfg.eval_benchmark,
            "eval_dataset_path: needed; the data to evaluate on (or eval_benchmark)",
        ),
        (
            "eval",
            cfg.eval_benchmark_path or not cfg.eval_benchmark,
            f"eval_benchmark_path: needed with eval_benchmark: {cfg.eval_benchmark}; the directory with its files",
        ),
        (
            "export",
            cfg.eval_dataset_path or token_files or not cfg.quantization_eval,
            "eval_dataset_path: needed with quantization_eval: True; the data to evaluate on",
        ),
    )
    for commands, value, message in needs:
        if command in commands.split() and not value:
            yield message


def _training(cfg: Config) -> Iterator[str]:
    if not cfg.do_train:
        yield "do_train: False leaves `erniekit train` nothing to do; to evaluate only, use `erniekit eval`"
    if "none" in cfg.report_to and len(cfg.report_to) > 1:
        yield f"report_to: {', '.join(cfg.report_to)}: none goes with no other name. Remove one of them"
    if cfg.mix_strategy == "random" and cfg.max_steps <= 0:
        yield "max_steps: mix_strategy: random has no end, so max_steps must be more than 0 (or mix_strategy: concat)"
    if cfg.do_eval and not cfg.eval_dataset_path and cfg.dataset_type != "pretrain":
        strategy = cfg.evaluation_strategy
        reason = "do_eval: True" if strategy == "no" else f"evaluation_strategy: {strategy}"
        yield f"eval_dataset_path: needed with {reason}"


def _elastic(cfg: Config) -> Iterator[str]:
    """What a job with fewer data ranks would do in another order."""
    if not cfg.elastic:
        return
    if cfg.batch_size_warmup_steps and cfg.method.reads("batch_size_warmup_steps"):
        yield (
            f"elastic: not with batch_size_warmup_steps: {cfg.batch_size_warmup_steps}: a smaller job could not keep "
            "the same growing batch. Leave one of the two out"
        )
    with_text = cfg.text_dataset_path and cfg.method.reads("text_dataset_path")
    if with_text and cfg.modality_interleave == "acc":
        yield (
            "elastic: not with modality_interleave: acc: a turn is a microbatch of all ranks, so a smaller job would "
            "train on pictures and text in another order. Set modality_interleave: batch or mixed, or elastic: False"
        )


def shape_given(cfg: Config) -> dict[str, int | float | bool]:
    """The keys of the model's shape that are given."""
    values = {field.name: vars(cfg)[field.name] for field in dataclasses.fields(ShapeArgs)}
    return {name: value for name, value in values.items() if value is not None}


def _shape(cfg: Config) -> Iterator[str]:
    """Checks a model whose shape the YAML gives, without a model directory."""
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
    elif "head_dim" not in given and given["hidden_size"] % given["num_attention_heads"]:
        yield (
            f"head_dim: needed, since hidden_size: {cfg.hidden_size} does not divide by num_attention_heads: "
            f"{cfg.num_attention_heads}"
        )
    if cfg.continue_training:
        yield "continue_training: a shape without model_name_or_path has no weights; set continue_training: false"
    if not cfg.tokenizer_name_or_path:
        yield "tokenizer_name_or_path: needed with a shape and no model_name_or_path; the tokenizer's directory"


def _recompute(cfg: Config) -> Iterator[str]:
    if cfg.recompute and cfg.recompute_granularity == "selective":
        modules = cfg.recompute_modules
        if not set(modules) - {"loss_fn"}:
            yield "recompute_modules: names nothing to recompute. Give modules such as core_attn, or recompute: false"
        for whole, parts in (("attention", ("core_attn",)), ("moe", ("experts", "shared_experts"))):
            for part in parts:
                if whole in modules and part in modules:
                    yield f"recompute_modules: {part} is a part of {whole}; leave one of the two out"


def _qat(cfg: Config) -> Iterator[str]:
    if cfg.qat != "none" and cfg.compute_type in precision_keys.LOW_BIT:
        yield (
            f"qat: {cfg.qat}: it trains 16-bit weights for a scheme, but compute_type: {cfg.compute_type} holds a "
            "frozen base in 8 or 4 bits. Set compute_type: bf16, or qat: none"
        )
    order = cfg.hadamard_block_size
    if order is not None and order & (order - 1):
        yield f"hadamard_block_size: {order} is not a power of two; there is no such Hadamard matrix here. Leave it out"


def _qat_training(cfg: Config) -> Iterator[str]:
    if cfg.qat == "none":
        return
    if cfg.fp8 != "none":
        yield f"qat: {cfg.qat}: not together with fp8: {cfg.fp8}, which multiplies in FP8 itself. Set fp8: none"
    if cfg.fine_tuning == "LoRA" and cfg.use_dora:
        yield f"qat: {cfg.qat}: weights with a DoRA adapter in them are not quantised here. Set use_dora: False"
    if cfg.fine_tuning == "LoRA" and cfg.lora_dropout:
        yield (
            f"qat: {cfg.qat}: the adapter is quantised within the weights, so its input cannot be dropped apart from "
            "theirs. Set lora_dropout: 0"
        )


def _expressions(cfg: Config) -> Iterator[str]:
    for key in ("lora_target_modules", "frozen_parameters"):
        for entry in vars(cfg)[key]:
            try:
                re.compile(entry)
            except re.error as error:
                yield f"{key}: {entry!r} is not a valid regular expression: {error}"


def _lora(cfg: Config) -> Iterator[str]:
    if cfg.fine_tuning != "LoRA":
        if cfg.lora_path:
            yield (
                f"lora_path: {cfg.lora_path} with fine_tuning: {cfg.fine_tuning}: set fine_tuning: LoRA, or export the "
                "adapter first and train the merged model"
            )
        return
    if cfg.optim == "muon":
        yield "optim: muon updates the matrices of layers, which fine_tuning: LoRA freezes: set optim: adamw"
    if not cfg.continue_training:
        yield "continue_training: fine_tuning: LoRA adapts trained weights; with a random start use fine_tuning: Full"
    if cfg.mtp_depths:
        yield (
            f"num_nextn_predict_layers: {cfg.mtp_depths}: fine_tuning: LoRA does not train multi-token "
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
    yield from option_problems(cfg.loss_type, cfg.label_smoothing, cfg.offset_alpha)
    if not cfg.pref_loss_ratio and not cfg.sft_loss_ratio and cfg.loss_type != "orpo":
        yield "pref_loss_ratio: 0, and sft_loss_ratio: 0: nothing is left to train on; raise one of them"
    if cfg.ref_logps_cache and cfg.ref_model_update_steps > 0:
        yield (
            "ref_logps_cache: a reference that changes (ref_model_update_steps) cannot be computed beforehand. Leave "
            "one of the two out"
        )
    if cfg.ref_logps_cache and cfg.method.vision:
        yield (
            f"ref_logps_cache: not with stage: {cfg.method.name}: the file knows a pair by its tokens, which do not "
            "tell its pictures. Leave it out; with fine_tuning: LoRA the reference needs no second copy either"
        )


def _distillation(cfg: Config) -> Iterator[str]:
    if cfg.method.reads("teacher_model_name_or_path") and cfg.teacher_model_name_or_path is None:
        yield "teacher_model_name_or_path: needed with stage: GKD; the directory or name of the model to learn from"
    if cfg.method.reads("gkd_beta") and cfg.temperature < LEAST_LEARNED_TEMPERATURE:
        yield (
            f"temperature: {cfg.temperature:g}: it divides the logits of both models, and has to be at least "
            f"{LEAST_LEARNED_TEMPERATURE:g}. Use 0.9, which is TRL's, or 1.0"
        )


def _best(cfg: Config) -> Iterator[str]:
    needs_evaluation = {
        "load_best_model_at_end": cfg.load_best_model_at_end,
        "early_stopping_patience": cfg.early_stopping_patience is not None,
    }
    for name, wanted in needs_evaluation.items():
        if wanted and cfg.evaluation_strategy == "no":
            yield f"{name}: needs evaluations to compare: set evaluation_strategy to steps or epoch"
    if cfg.load_best_model_at_end and cfg.save_strategy == "no":
        yield "load_best_model_at_end: needs checkpoints to choose from: set save_strategy to steps or epoch"
    metric = (cfg.metric_for_best_model or cfg.method.metric).removeprefix("eval_")
    if cfg.evaluation_strategy != "no" and metric == "completion_length" and cfg.greater_is_better is None:
        yield f"greater_is_better: needed with metric_for_best_model: {metric}, since longer may be better or worse"
    known = metrics_of(cfg)
    if cfg.evaluation_strategy != "no" and metric not in known:
        yield (
            f"metric_for_best_model: {metric}: an evaluation of stage: {cfg.method.name} gives no such number, but "
            f"{', '.join(known)}"
        )
