"""Keys that another key, or the model, makes pointless: every rule of the table fires, and only where it should."""

import dataclasses
import functools
from typing import Any

import pytest

from erniekit.config import Config, load, pointless
from erniekit.config.methods import BUILT
from erniekit.config.pointless import METHOD_RULES, RULES, Facts

BASE = {"model_name_or_path": "m", "output_dir": "o"}
TRAIN = {**BASE, "train_dataset_path": "a.jsonl"}
TOKENS = {"train_dataset_path": None, "dataset_type": "pretrain", "stage": "PT", "input_dir": "data/a"}
EVAL = {"eval_dataset_path": "e.jsonl"}
EVALUATED = {**EVAL, "evaluation_strategy": "epoch"}
TWO = {"train_dataset_path": "a,b", "max_steps": 1}
DPO: dict[str, Any] = {"stage": "DPO"}
VL: dict[str, Any] = {"stage": "VL-SFT"}
VL_DPO: dict[str, Any] = {"stage": "VL-DPO"}
W4: dict[str, Any] = {"quantization": "wint4"}
CALIBRATED: dict[str, Any] = {**W4, "quantization_calibration_path": "a.jsonl"}
GPTQ = {"quantization_algorithm": "gptq"}
MEASURED = {**W4, "quantization_eval": True, "eval_dataset_path": "e", "eval_dataset_type": "erniekit"}
SMOOTH = {**CALIBRATED, "quantization": "w8a8", "quantization_algorithm": "smoothquant"}
LORA = {"fine_tuning": "LoRA"}
KTO: dict[str, Any] = {"stage": "KTO"}
GKD: dict[str, Any] = {"stage": "GKD", "teacher_model_name_or_path": "t"}
RL: dict[str, Any] = {"stage": "RL"}
METHOD_EXTRAS = {"GKD": GKD}  # what the configuration of a method needs
MMLU: dict[str, Any] = {"eval_benchmark": "mmlu", "eval_benchmark_path": "d"}
WRITTEN = {"eval_benchmark_mode": "generate"}

# (command, keys with their values, where they are pointless, where they are not); facts are under "facts".
# None instead of the last: there is no configuration of this command in which they do something.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]] = [
    ("train", {"packing": True, "mix_strategy": "interleave_over", "on_bad_line": "skip"}, TOKENS, {}),
    ("train", {"dataloader_num_workers": 2}, TOKENS, {}),
    ("train", {"muon_momentum": 0.9, "muon_ns_steps": 6, "muon_ffn_split": True}, {}, {"optim": "muon"}),
    ("chat", {"quantization_group_size": 64}, {}, {"qat": "wint4/8"}),
    ("train", {"quantization_clip_search": False}, {}, None),
    ("split", {"quantization_group_size": 64}, {}, None),
    ("split", {"qat": "w8a8", "quant_input_grad": True}, {}, None),
    ("export", {"qat_distill_weight": 0.5}, {"qat": "w8a8"}, None),
    ("eval", {"qat_distill_weight": 0.5, "quant_input_grad": True}, {**EVAL, "qat": "w8a8"}, None),
    ("train", {"apply_hadamard": True, "quant_weight_grad": True}, {}, {"qat": "fp8_static"}),
    ("train", {"apply_hadamard": True, "actscale_moving_rate": 0.1}, {"qat": "wint8"}, {"qat": "w4a8"}),
    ("train", {"hadamard_block_size": 32}, {"qat": "fp8_static", "apply_hadamard": False}, {"qat": "fp8_static"}),
    ("train", {"qat_distill_weight": 0.5}, {**DPO, "qat": "w8a8"}, {"qat": "w8a8"}),
    ("train", {"qat_distill_weight": 0.5}, {**VL_DPO, "qat": "w8a8"}, {**VL, "qat": "w8a8"}),
    ("export", {"quantization_clip_search": False}, {}, {"quantization": "wint4"}),
    (
        "export",
        {"quantization_clip_search": False},
        {"quantization": "wint2", "format": "paddle", "quantization_first_layers": 0},
        {"quantization": "wint2", "format": "paddle", "quantization_first_layers": 1},
    ),
    ("export", {"quantization_group_size": 64}, {"quantization": "w8a8"}, {"quantization": "wint4/8"}),
    ("train", {"split": "8,1,1", "isolate_documents": True}, {}, TOKENS),
    ("train", {"train_dataset_prob": "0.5,0.5"}, TWO, {**TWO, "mix_strategy": "random"}),
    ("eval", {"eval_dataset_prob": "0.5,0.5"}, {"eval_dataset_path": "a,b"}, None),
    ("train", {"eval_dataset_type": "erniekit"}, {"do_eval": True, **TOKENS}, EVALUATED),
    ("train", {"num_samples_each_epoch": 9}, {}, {"mix_strategy": "random", "max_steps": 1}),
    ("train", {"greedy_intokens": True, "buffer_size": 500}, {}, {"packing": True}),
    ("train", {"buffer_size": 5}, {"packing": True, "greedy_intokens": False}, {"packing": True}),
    ("train", {"truncation": "cut"}, {"stage": "PT"}, {}),
    ("train", {"max_pixels": 784, "video_target_frames": 3}, {}, {"stage": "VL-SFT"}),
    ("train", {"modality_ratio": "2,1", "text_dataset_type": "messages"}, VL, {**VL, "text_dataset_path": "t.jsonl"}),
    (
        "train",
        {"text_dataset_prob": "0.5,0.5"},
        {**VL, "text_dataset_path": "t,u"},
        {**VL, "text_dataset_path": "t,u", "mix_strategy": "interleave_over"},
    ),
    ("train", {"num_nextn_predict_layers": 1, "token_balance_loss": "row", "z_loss_lambda": 0.1}, VL_DPO, VL),
    ("train", {"max_prompt_len": 9}, VL_DPO, DPO),
    ("train", {"text_dataset_path": "t.jsonl"}, VL_DPO, VL),
    (
        "train",
        {"text_dataset_type": "messages", "text_dataset_prob": "1", "modality_ratio": "2,1"},
        {**VL_DPO, "text_dataset_path": "t.jsonl", "mix_strategy": "interleave_over"},
        {**VL, "text_dataset_path": "t.jsonl", "mix_strategy": "interleave_over"},
    ),
    ("train", {"modality_interleave": "mixed"}, {**VL_DPO, "text_dataset_path": "t"}, {**VL, "text_dataset_path": "t"}),
    ("train", {"fp8_modules": "mlp", "fp8_store": False, "fp8_statistics_steps": 5}, {}, {"fp8": "blockwise"}),
    (
        "train",
        {"fp8_recompute_up_gate_layers": "1", "fp8_routing_weight": "after"},
        {"fp8": "blockwise", "fp8_modules": "attention"},
        {"fp8": "blockwise"},
    ),
    (
        "train",
        {"fp8_statistics_steps": 5},
        {"fp8": "blockwise", "max_steps": 4},
        {"fp8": "blockwise", "max_steps": 5},
    ),
    ("eval", {"fp8": "blockwise", "fp8_scale": "real"}, EVAL, None),
    ("train", {"profile_step_start": 3, "profile_step_end": 5}, {}, {"profile": True}),
    ("train", {"scale_loss": 1024.0}, {"compute_type": "bf16"}, {"compute_type": "fp16"}),
    ("eval", {"scale_loss": 1024.0, "emulate_precision": True, "matmul_precision": "bf16"}, EVAL, None),
    (
        "eval",
        {"adaptive_max_imgtoken_option": "9", "adaptive_max_imgtoken_rate": "1"},
        {**EVAL, **VL},
        None,
    ),
    ("eval", {"vision_experts_down_scale": 0.5}, {**EVAL, **VL}, {**EVAL, **VL, "vision_config_path": "v"}),
    ("train", {"vision_experts_down_scale": 0.5}, VL, {**VL, "vision_config_path": "v"}),
    (
        "train",
        {"vision_experts_down_scale": 0.5},
        {**VL, "vision_config_path": "v", "vision_experts_from_text": False},
        {**VL, "vision_config_path": "v"},
    ),
    (
        "train",
        {"video_fps": 1, "video_max_frames": 9},
        {**VL, "video_target_frames": 4},
        {**VL, "video_target_frames": -1},
    ),
    ("train", {"vit_lr_ratio": 0.9}, {"facts": Facts(sees_pictures=False)}, {"facts": Facts(sees_pictures=True)}),
    ("train", {"vit_lr_ratio": 0.9}, {**VL, "freeze_config": "freeze_vision"}, {**VL, "freeze_config": "freeze_lm"}),
    ("train", {"visual_ld": 0.9}, {**VL, "vit_lr_ratio": 0.8}, VL),
    (
        "train",
        {"vit_lr_ratio": 0.9},
        {**VL, "fine_tuning": "LoRA"},
        {**VL, "fine_tuning": "LoRA", "lora_target_modules": "attn.qkv"},
    ),
    ("train", {"resampler_lr_ratio": 0.5}, {**VL, "frozen_parameters": "resampler"}, VL),
    ("train", {"chat_tools": "image_zoom_in_tool"}, {}, None),
    ("chat", {"image_search_dir": "d"}, {}, {"chat_tools": "image_search"}),
    ("chat", {"max_tool_rounds": 3}, {}, {"chat_tools": "image_zoom_in_tool"}),
    ("chat", {"box_coordinates": "pixels"}, {}, None),
    ("chat", {"host": "0.0.0.0", "max_num_seqs": 4}, {}, None),
    ("server", {"stream": False}, {}, None),
    ("train", {"max_estimate_samples": 9}, {"max_steps": 5}, {"max_steps": 5, "save_strategy": "epoch"}),
    ("train", {"num_train_epochs": 1}, {"max_steps": 5}, {}),
    ("train", {"eval_steps": 5}, EVALUATED, {**EVAL, "evaluation_strategy": "steps"}),
    ("train", {"eval_dataset_path": "e.jsonl", "max_evaluate_steps": 3}, {}, {"do_eval": True}),
    ("train", {"metric_for_best_model": "loss", "greater_is_better": True}, {}, EVALUATED),
    ("train", {"save_steps": 500}, {"save_strategy": "epoch"}, {}),
    ("train", {"save_total_limit": 2, "use_async_save": True}, {"save_strategy": "no"}, {}),
    ("train", {"ckpt_quant_stage": "O1"}, {"ignore_save_lr_and_optim": True}, {}),
    ("train", {"logging_dir": "l"}, {}, {"report_to": "tensorboard"}),
    ("train", {"logging_dir": "l"}, {"report_to": "trackio"}, {"report_to": "trackio,wandb"}),
    ("train", {"run_name": "r", "project": "p"}, {"report_to": "tensorboard"}, {"report_to": "tensorboard,mlflow"}),
    ("train", {"eval_benchmark": "mmlu", "eval_benchmark_path": "d"}, {}, None),
    ("eval", {"eval_benchmark_path": "d", "num_fewshot": 2, "eval_chat_template": True}, EVAL, MMLU),
    ("eval", {"max_seq_len": 9, "predict_with_generate": True, "packing": True}, {**EVAL, **MMLU}, EVAL),
    ("eval", {"on_bad_line": "skip"}, MMLU, EVAL),
    ("eval", {"max_new_tokens": 9, "top_p": 0.5}, MMLU, {**MMLU, **WRITTEN, "temperature": 1.0}),
    ("eval", {"batch_size": 9}, {**MMLU, **WRITTEN}, MMLU),
    ("eval", {"enable_thinking": True}, {**MMLU, **WRITTEN}, {**MMLU, **WRITTEN, "eval_chat_template": True}),
    ("eval", {"chat_template": "text"}, MMLU, {**MMLU, **WRITTEN}),
    ("train", {"ignore_data_skip": True}, {"resume_from_checkpoint": "none"}, {}),
    ("train", {"save_format": "paddle"}, LORA, {}),
    ("train", {"temperature": 0.5, "top_p": 0.9, "predict_with_generate": True}, {}, None),
    ("train", {"eval_output": "x"}, {}, None),
    ("train", {"checkpoint": "x"}, {}, None),
    ("train", {"format": "paddle", "max_shard_size": 2}, {}, None),
    ("train", {"min_lr": 1e-6}, {"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "wsd:5"}),
    ("train", {"decay_function": "1-sqrt"}, {}, {"lr_scheduler_type": "wsd:5"}),
    ("train", {"num_cycles": 1.5}, {}, {"lr_scheduler_type": "cosine"}),
    ("train", {"power": 2, "lr_end": 1e-6}, {}, {"lr_scheduler_type": "polynomial"}),
    ("train", {"decay_steps": 5}, {"lr_scheduler_type": "constant_with_warmup"}, {}),
    ("train", {"warmup_steps": 5}, {"lr_scheduler_type": "constant"}, {}),
    ("train", {"warmup_ratio": 0.1}, {"warmup_steps": 5}, {}),
    ("train", {"neftune_noise_alpha": 3}, {}, {"neftune": True}),
    ("train", {"batch_size_warmup_steps": 3}, {}, {"gradient_accumulation_steps": 4}),
    ("train", {"moe_gate_lr_ratio": 0.1, "moe_orthogonal_loss_lambda": 1e-3}, LORA, {}),
    ("train", {"ignore_data_skip": True}, {"overwrite_output_dir": True}, {}),
    ("train", {"reference_free": True}, {**DPO, "loss_type": "simpo"}, DPO),
    ("chat", {"eval_output": "x", "predict_with_generate": True, "copy_tokenizer": False}, {}, None),
    ("eval", {"max_shard_size": 2}, EVAL, None),
    ("export", {"temperature": 0.5}, {}, None),
    ("split", {"format": "paddle"}, {}, None),
    ("train", {"amp_master_grad": True}, {"compute_type": "fp32"}, {}),
    ("train", {"multi_token_pred_lambda": 0.1}, {}, {"num_nextn_predict_layers": 1}),
    ("train", {"recompute_granularity": "full", "no_recompute_layers": "1"}, {}, {"recompute": True}),
    (
        "train",
        {"use_recompute_moe": True},
        {"recompute": True},
        {"recompute": True, "recompute_granularity": "full_attn"},
    ),
    (
        "train",
        {"recompute_modules": "attention"},
        {"recompute": True, "recompute_granularity": "core_attn"},
        {"recompute": True, "recompute_granularity": "selective"},
    ),
    ("train", {"offload_activations": True}, {}, {"recompute": True}),
    (
        "train",
        {"use_recompute_moe": True},
        {"recompute": True, "recompute_granularity": "selective", "recompute_modules": "moe"},
        {"recompute": True, "recompute_granularity": "selective", "recompute_modules": "attention"},
    ),
    ("train", {"use_recompute_mtp": True}, {"recompute": True}, {"recompute": True, "num_nextn_predict_layers": 1}),
    ("train", {"lora_rank": 8, "rslora": True}, {}, LORA),
    ("train", {"lora_rank": 8}, {**LORA, "lora_path": "p"}, LORA),
    ("train", {"moe_aux_loss_lambda": 0.1}, {"facts": Facts(num_experts=0)}, {"facts": Facts(num_experts=8)}),
    ("train", {"moe_use_aux_free_update_coef": 0.1}, {"facts": Facts(aux_free=False)}, {"facts": Facts(aux_free=True)}),
    ("train", {"dropout_warmup_steps": 5}, {}, {"attention_probs_dropout_prob": 0.1}),
    ("export", {"num_hidden_layers": 2}, {}, None),
    ("train", {"beta": 0.1, "max_prompt_len": 2048}, {}, DPO),
    ("train", {"num_nextn_predict_layers": 1}, DPO, {}),
    ("train", {"token_balance_loss": "row"}, DPO, {}),
    ("train", {"z_loss_lambda": 0.1}, DPO, {}),
    ("train", {"text_dataset_path": "t"}, {}, VL),
    ("train", {"simpo_gamma": 0.2}, DPO, {**DPO, "loss_type": "simpo"}),
    ("train", {"dpop_lambda": 0.2}, DPO, {**DPO, "loss_type": "dpop"}),
    ("train", {"beta": 0.2}, {**DPO, "loss_type": "orpo"}, DPO),
    ("train", {"ref_logps_cache": "c"}, {**DPO, "reference_free": True}, DPO),
    ("train", {"ref_model_update_steps": 5}, {**DPO, **LORA}, DPO),
    ("train", {"normalize_logps": True}, {**DPO, "loss_type": "simpo"}, DPO),
    ("export", {"tensor_parallel_degree": 2}, {}, None),
    ("train", {"sequence_parallel": True}, {}, {"tensor_parallel_degree": 2}),
    ("train", {"pipeline_schedule": "1f1b"}, {}, {"pipeline_parallel_degree": 2}),
    ("train", {"elastic": True}, {}, {"max_restarts": 1}),
    ("eval", {"max_restarts": 1, "elastic": True}, EVAL, None),
    ("chat", {"max_restarts": 1}, {}, None),
    ("train", {"sharding": "stage1"}, {"facts": Facts(data_ranks=1)}, {"facts": Facts(data_ranks=2)}),
    ("train", {"balance_pictures": True}, {}, VL),
    ("train", {"balance_pictures": True}, {**VL, "facts": Facts(data_ranks=1)}, {**VL, "facts": Facts(data_ranks=2)}),
    ("train", {"distributed_timeout": 9}, {"facts": Facts(ranks=1)}, {"facts": Facts(ranks=2)}),
    ("train", {"quantization_algorithm": "gptq", "quantization_damping": 0.1}, {}, None),
    ("export", {"quantization_algorithm": "gptq", "quantization_calibration_path": "a"}, {}, {"quantization": "wint4"}),
    ("export", {"quantization_calibration_type": "text", "quantization_calibration_samples": 9}, W4, CALIBRATED),
    ("export", {"quantization_damping": 0.1, "quantization_act_order": False}, CALIBRATED, {**CALIBRATED, **GPTQ}),
    ("export", {"quantization_smoothing": 0.8}, CALIBRATED, SMOOTH),
    ("train", {"quantization_eval": True}, {}, None),
    ("export", {"quantization_eval": True}, {"eval_dataset_path": "e"}, {**W4, "eval_dataset_path": "e"}),
    ("export", {"temperature": 0.5, "predict_with_generate": True}, W4, MEASURED),
    ("eval", {"max_new_tokens": 9}, EVAL, {**EVAL, "predict_with_generate": True}),
    ("eval", {"num_hidden_layers": 1, "moe_k": 2}, EVAL, {**EVAL, "continue_training": False}),
    ("eval", {"temperature": 0.5, "top_k": 5}, {**EVAL, **RL}, {**EVAL, "predict_with_generate": True}),
    ("eval", {"max_new_tokens": 9}, {**EVAL, **RL, "max_completion_length": 8}, {**EVAL, **RL}),
    ("eval", {"repetition_penalty": 1.1, "enable_thinking": True}, EVAL, {**EVAL, **RL}),
    ("eval", {"stream": True}, {**EVAL, "predict_with_generate": True}, None),
    ("chat", {"data_parallel_degree": 2}, {}, None),
    ("chat", {"context_parallel_degree": 2}, {}, None),
    ("train", {"cp_comm_type": "a2a"}, {}, {"context_parallel_degree": 2}),
    ("chat", {"top_p": 0.9, "top_k": 4}, {"temperature": 0}, {}),
    ("train", {"num_nextn_predict_layers": 1, "token_balance_loss": "row", "z_loss_lambda": 0.1}, KTO, {}),
    ("train", {"max_new_tokens": 9, "top_k": 4, "repetition_penalty": 1.1, "top_p": 0.9}, {**GKD, "lmbda": 0}, GKD),
    ("train", {"kl_estimator": "k1", "kl_bias_correction": False}, RL, {**RL, "kl_coef": 0.1}),
    ("train", {"kl_bias_correction": False}, {**RL, "kl_coef": 0.1, "kl_in_reward": True}, {**RL, "kl_coef": 0.1}),
    ("train", {"ref_model_sync_steps": 5}, {**RL, "kl_coef": 0.1}, {**RL, "kl_coef": 0.1, "sync_ref_model": True}),
    ("train", {"epsilon": 0.1}, {**RL, "rl_algorithm": "cispo"}, {**RL, "rl_algorithm": "grpo"}),
    ("train", {"icepop_alpha": 0.4, "tis_cap": 3, "mis_cap": 3}, RL, None),
    ("train", {"icepop_alpha": 0.4}, RL, {**RL, "rollout_correction": "icepop"}),
    ("train", {"tis_cap": 3}, RL, {**RL, "rollout_correction": "tis"}),
    ("train", {"mis_cap": 3}, RL, {**RL, "rollout_correction": "mis"}),
    ("train", {"min_tokens": 1, "frequency_penalty": 0.1, "presence_penalty": 0.1, "stream": False}, RL, None),
    ("train", {"min_tokens": 1, "frequency_penalty": 0.1, "presence_penalty": 0.1, "stream": False}, GKD, None),
    ("train", {"max_new_tokens": 9}, {**RL, "max_completion_length": 5}, RL),
    ("train", {"domain_normalize": True}, {**RL, "scale_rewards": "gdpo"}, {**RL, "scale_rewards": "group"}),
    ("train", {"importance_sampling_level": "token"}, {**RL, "rollout_correction": "misc"}, RL),
    ("train", {"upo_beta": 0.2, "upo_margin": 0.1}, RL, {**RL, "upo_weight": 0.1}),
    ("train", {"upo_offline_path": "p.jsonl"}, RL, {**RL, "upo_offline_weight": 0.1}),
    (
        "train",
        {"rollout_model": "m", "rollout_tolerance": 0.5},
        RL,
        {**RL, "rollout_base_url": "http://a/v1", "fine_tuning": "LoRA"},
    ),
    ("train", {"print_completions_steps": 5}, {**RL, "num_completions_to_print": 0}, RL),
    ("train", {"max_resample_times": 5, "difficulty_low": 0.1}, RL, {**RL, "dynamic_sample": True}),
    ("train", {"difficulty_momentum": 0.5}, RL, {**RL, "difficulty_weighting": "variance"}),
    (
        "train",
        {"freeze_router_bias": True},
        {**RL, "facts": Facts(num_experts=0)},
        {**RL, "facts": Facts(num_experts=4)},
    ),
    ("train", {"moe_use_aux_free": True}, {**RL, "freeze_router_bias": True}, {**RL, "freeze_router_bias": False}),
    ("train", {"answer_key": "a"}, {**RL, "reward_funcs": "format"}, RL),
    ("train", {"reward_min_length": 5, "cosine_max_length": 99, "reward_language": "zh"}, RL, None),
    ("train", {"reward_coordinates": "pixels", "judge_model": "m", "code_time_limit": 3}, RL, None),
    ("train", {"reward_model_path": "p"}, RL, None),
    ("train", {"eval_benchmark": "mmlu"}, {}, None),
    ("train", {"run_name": "r"}, {"report_to": "tensorboard"}, {"report_to": "wandb"}),
    ("train", {"logging_dir": "l"}, {"report_to": "trackio"}, {"report_to": "wandb"}),
    ("split", {"max_new_tokens": 9, "predict_with_generate": True}, {}, None),
    ("train", {"max_new_tokens": 9, "min_tokens": 1, "top_k": 4, "repetition_penalty": 1.1, "stream": True}, {}, None),
    ("train", {"frequency_penalty": 0.1, "presence_penalty": 0.1, "enable_thinking": True}, {}, None),
    ("train", {"kto_loss_type": "apo_zero_unpaired", "desirable_weight": 2.0, "undesirable_weight": 2.0}, {}, KTO),
    ("train", {"beta": 0.2}, GKD, KTO),
    *(
        ("train", {"num_nextn_predict_layers": 1, "token_balance_loss": "sample", "z_loss_lambda": 0.1}, stage, {})
        for stage in (KTO, GKD, RL)
    ),
    *(("train", {"qat_distill_weight": 0.5}, {**stage, "qat": "w8a8"}, {"qat": "w8a8"}) for stage in (KTO, GKD, RL)),
    ("train", {"teacher_model_name_or_path": "t", "gkd_beta": 0.1, "lmbda": 0.1}, {}, GKD),
    ("train", {"max_new_tokens": 9, "top_p": 0.9, "top_k": 4, "repetition_penalty": 1.1}, {**GKD, "lmbda": 0}, GKD),
    (
        "train",
        {"max_resample_times": 2, "difficulty_low": 0.1, "difficulty_high": 0.9, "difficulty_pause": 2},
        RL,
        {**RL, "dynamic_sample": True},
    ),
    (
        "train",
        {"difficulty_momentum": 0.1, "difficulty_floor": 0.1},
        RL,
        {**RL, "difficulty_weighting": "variance"},
    ),
    ("train", {"max_turns": 3, "max_tool_calls": 2, "max_tool_tokens": 9}, RL, {**RL, "tools": "calculator"}),
    ("train", {"tool_timeout": 3}, {**RL, "tools": "calculator"}, {**RL, "tools": "a.py:f"}),
    ("train", {"document_search_path": "d"}, {**RL, "tools": "calculator"}, {**RL, "tools": "document_search"}),
    ("train", {"dynamic_sample": True, "difficulty_weighting": "variance", "difficulty_metric": "format"}, {}, RL),
    ("train", {"tools": "calculator"}, {}, RL),
]


def configuration(command: str, *given: dict[str, Any]) -> tuple[Config, Facts | None]:
    values = dict(TRAIN if command == "train" else BASE)
    for more in given:
        values |= more
    facts = values.pop("facts", None)
    return load(None, values, command), facts


def named(command: str, *given: dict[str, Any]) -> set[str]:
    cfg, facts = configuration(command, *given)
    lines = [*pointless.notes(cfg, command), *(pointless.notes(cfg, command, facts) if facts else [])]
    return {name for line in lines for name in line.partition(": no effect: ")[0].split(", ")}


@pytest.mark.parametrize(("command", "keys", "pointless_in", "useful_in"), CASES)
def test_a_key_is_named_where_it_does_nothing_and_only_there(command, keys, pointless_in, useful_in):
    assert keys.keys() <= named(command, pointless_in, keys)
    assert not keys.keys() & named(command, {key: value for key, value in pointless_in.items() if key not in keys})
    if useful_in is not None:
        assert not keys.keys() & named(command, useful_in, keys)


@functools.cache
def loaded_case(place: int) -> tuple[Config, Facts]:
    command, keys, pointless_in, _ = CASES[place]
    cfg, facts = configuration(command, pointless_in, keys)
    return cfg, facts or Facts()


def fires(rule: pointless.Rule, place: int) -> bool:
    command, keys, *_ = CASES[place]
    about = keys.keys() & set(rule.keys.split())
    return bool(about) and command in rule.commands and rule.when(*loaded_case(place))


@pytest.mark.parametrize(
    "rule",
    [rule for rule in RULES if rule not in METHOD_RULES],
    ids=lambda rule: f"{rule.keys.split()[0]}-{rule.why[:30]}",
)
def test_every_rule_has_a_case(rule):
    assert any(fires(rule, place) for place in range(len(CASES)))


@pytest.mark.parametrize("stage", BUILT)
def test_the_rules_of_methods_name_the_keys_that_a_method_does_not_read(stage):
    cfg, _ = configuration("train", METHOD_EXTRAS.get(stage, {}), {"stage": stage})
    named_keys = {key for rule in METHOD_RULES if rule.when(cfg, Facts()) for key in rule.keys.split()}
    unread = {field.name for field in dataclasses.fields(Config) if not cfg.method.reads(field.name)}
    assert named_keys == unread


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.keys.split()[0]}-{rule.why[:30]}")
def test_a_rule_speaks_of_keys_that_exist_and_gives_a_reason(rule):
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(rule.keys.split()) <= fields
    cfg, _ = configuration("train")
    assert len(rule.why.format_map(vars(cfg) | {"command": "train"})) > 8 and not rule.why.endswith(".")


def test_defaults_and_switches_that_are_off_are_not_named():
    assert configuration("train")[0].notes == ()
    off = {"rslora": False, "lora_dropout": 0, "packing": False, "eval_steps": None, "data_parallel_degree": -1}
    assert configuration("train", off, {"sequence_parallel": False})[0].notes == ()


def test_a_default_that_the_user_gave_is_named():
    assert "num_train_epochs" in named("train", {"max_steps": 3, "num_train_epochs": 1.0})
    assert "num_train_epochs" not in named("train", {"max_steps": 3})


def test_the_strength_of_the_noise_says_what_switches_it_on():
    """In LLaMA-Factory the strength alone does."""
    [note] = configuration("train", {"neftune_noise_alpha": 5})[0].notes
    assert note == "neftune_noise_alpha: no effect: neftune is False; neftune: true switches the noise on"


def test_another_name_of_a_key_is_named_by_the_key():
    assert "lora_rank" in named("train", {"lora_r": 4})


def test_a_saved_configuration_names_only_what_differs_from_the_defaults(tmp_path):
    cfg, _ = configuration("train", {"max_steps": 3, "num_train_epochs": 1.0, "lora_rank": 4})
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    again = load(str(tmp_path / "config.yaml"))
    assert again == cfg and again.notes == ("lora_rank: no effect: read only with fine_tuning: LoRA",)


def test_do_eval_gives_way_to_the_strategy_with_a_line():
    cfg, _ = configuration("train", EVALUATED, {"do_eval": False})
    assert cfg.do_eval and any(note.startswith("do_eval: False: no effect") for note in cfg.notes)
