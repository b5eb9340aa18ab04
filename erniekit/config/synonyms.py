"""Names in LLaMA-Factory, TRL, transformers, PEFT, ms-swift, Megatron-LM and PaddleFormers for settings that have
another name here, or no key. They are not accepted, since each setting should have one name; the error about an unknown
key suggests our name instead.
"""

import difflib
from collections.abc import Iterable

from erniekit.config.methods import BUILT, join_names
from erniekit.config.schema_use import BENCHMARKS

_CLOSE = 0.82  # from this difflib ratio on, a name counts as a typo of another; pref_beta and rope_theta have 0.63

# Our key -> its names elsewhere, with the same values.
_SAME: dict[str, str] = {
    "project": "wandb_project swanlab_project experiment_name",
    "run_name": "wandb_run_name swanlab_run_name experiment_run_name",
    "model_name_or_path": "model model_name model_path base_model base_model_name_or_path pretrained_model",
    "train_dataset_path": "dataset datasets dataset_path train_dataset train_data train_file train_path data_path data",
    "train_dataset_type": "dataset_format data_format formatting",
    "train_dataset_prob": "interleave_probs dataset_prob dataset_probs",
    "eval_dataset_path": "eval_dataset val_dataset eval_data eval_file val_file validation_file valid_data",
    "max_seq_len": "cutoff_len max_length max_len seq_length seq_len sequence_len model_max_length max_source_length",
    "max_prompt_len": "max_prompt_length",
    "max_new_tokens": "max_tokens max_target_length max_gen_len",
    "dataloader_num_workers": "num_workers preprocessing_num_workers num_proc",
    "random_shuffle": "shuffle data_shuffle shuffle_dataset train_dataloader_shuffle",
    "min_pixels": "image_min_pixels min_image_pixels",
    "max_pixels": "image_max_pixels max_image_pixels image_resolution",
    "video_max_pixels": "video_resolution",
    "video_fps": "fps",
    "video_min_frames": "fps_min_frames min_frames",
    "video_max_frames": "video_maxlen fps_max_frames max_frames",
    "video_target_frames": "nframes num_frames",
    "packing": "neat_packing sample_packing zero_padding",
    "chat_template": "prompt_template conversation_template template_type",
    "continue_training": "load_weights",
    "recompute": "gradient_checkpointing activation_checkpointing use_gradient_checkpointing",
    "attention_probs_dropout_prob": "attention_dropout attn_dropout attn_pdrop",
    "tokenizer_name_or_path": "tokenizer_path tokenizer_dir tokenizer_model",
    "num_hidden_layers": "num_layers n_layers",
    "num_attention_heads": "num_heads_q n_heads",
    "num_key_value_heads": "num_query_groups n_kv_heads",
    "intermediate_size": "ffn_hidden_size",
    "moe_num_experts": "num_experts",
    "moe_k": "num_experts_per_tok moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "vocab_size": "padded_vocab_size",
    "rope_theta": "rope_base rotary_base",
    "lora_rank": "r rank lora_dim lora_config_r",
    "lora_alpha": "alpha",
    "lora_dropout": "lora_drop",
    "lora_target_modules": "target_modules lora_target_module",
    "modules_to_save": "additional_target trainable_modules",
    "lora_plus_scale": "loraplus_lr_ratio lora_plus_lr_ratio",
    "lora_path": "adapter_name_or_path adapter adapters lora_name_or_path peft_path",
    "beta": "pref_beta dpo_beta",
    "loss_type": "pref_loss dpo_loss rpo_loss",
    "sft_loss_ratio": "pref_ftx rpo_alpha sft_weight",
    "label_smoothing": "dpo_label_smoothing",
    "dpop_lambda": "dpop_alpha",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
    "batch_size": "train_batch_size micro_batch_size micro_train_batch_size mbs eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accum_steps accumulation_steps "
    "accumulate_grad_batches",
    "num_train_epochs": "epochs epoch num_epochs max_epochs n_epochs train_epochs",
    "max_steps": "train_iters total_steps num_steps num_train_steps max_train_steps train_steps max_iters",
    "evaluation_strategy": "do_eval_strategy eval_mode",
    "eval_steps": "eval_interval eval_freq eval_every",
    "save_steps": "save_interval save_freq save_every checkpoint_interval",
    "logging_steps": "log_steps log_interval logging_interval log_every",
    "save_total_limit": "max_checkpoints keep_checkpoint_max",
    "early_stopping_patience": "early_stopping early_stopping_steps patience",
    "output_dir": "output out_dir save_dir save_path output_path checkpoint_dir save",
    "logging_dir": "log_dir tensorboard_dir",
    "resume_from_checkpoint": "resume resume_from load_checkpoint resume_checkpoint",
    "ignore_load_lr_and_optim": "resume_only_model no_load_optim",
    "ignore_save_lr_and_optim": "save_only_model no_save_optim",
    "seed": "random_seed data_seed",
    "optim": "optimizer optimizer_type optim_type",
    "learning_rate": "lr max_lr base_lr peak_lr",
    "min_lr": "min_learning_rate",
    "lr_scheduler_type": "scheduler lr_schedule lr_decay_style scheduler_type",
    "warmup_steps": "num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "warmup_ratio": "warmup_fraction lr_warmup_fraction warmup_proportion",
    "weight_decay": "wd",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "clip_grad gradient_clipping grad_clip gradient_clip_val max_norm",
    "neftune_noise_alpha": "neftune_alpha",
    "tensor_parallel_degree": "tp tp_size tensor_parallel_size",
    "pipeline_parallel_degree": "pp pp_size pipeline_parallel_size",
    "expert_parallel_degree": "ep ep_size expert_parallel_size",
    "data_parallel_degree": "dp dp_size",
    "virtual_pp_degree": "vpp vpp_size virtual_pipeline_parallel_size",
    "distributed_timeout": "ddp_timeout",
    "download_hub": "hub model_hub use_hub",
    "max_shard_size": "export_size shard_size",
    "quantization_calibration_path": "export_quantization_dataset",
    "quantization_calibration_samples": "export_quantization_nsamples",
    "quantization_calibration_length": "export_quantization_maxlen",
    "num_fewshot": "n_shot num_shots",
    "eval_benchmark_path": "task_dir",
    "predict_with_generate": "generation_eval",
    "moe_aux_loss_lambda": "moe_aux_loss_coeff moe_aux_loss_coef aux_loss_coef",
    "moe_z_loss_lambda": "moe_z_loss_coeff router_z_loss_coef",
    "num_generations": "rollout_n n_samples_per_prompt num_return_sequences",
    "max_completion_length": "max_response_length response_length max_completion_tokens",
    "num_iterations": "ppo_epochs",
    "epsilon": "clip_ratio clip_ratio_low eps_clip cliprange",
    "epsilon_high": "clip_ratio_high eps_clip_high",
    "delta": "clip_ratio_c",
    "kl_coef": "kl_loss_coef init_kl_coef",
    "mask_truncated_completions": "overlong_filter",
    "reward_funcs": "reward_function reward_functions",
    "rollout_base_url": "vllm_server_base_url",
    "lmbda": "gkd_lambda",
    "teacher_model_name_or_path": "teacher_model teacher_model_path",
}

_STAGES = f"stage takes {join_names(BUILT, 'or')}"

# Names of settings that are expressed differently here, or do not exist -> what to do instead.
_OTHERWISE: dict[str, str] = {
    "deepspeed fsdp zero_stage sharding_stage zero_optimization use_distributed_optimizer": (
        "sharding: stage1, stage2 or stage3 divides optimizer state, gradients and weights over ranks"
    ),
    "finetuning_type finetune_type train_type tuner_type sft_type training_type peft_type": (
        "fine_tuning takes Full or LoRA"
    ),
    "use_peft": "fine_tuning: LoRA asks for adapters",
    "val_size split_dataset_ratio validation_split test_size eval_ratio": (
        "nothing is split off the training data; put the evaluation data into a file of its own: eval_dataset_path"
    ),
    "dataset_dir": "train_dataset_path takes whole paths",
    "quantization_bit load_in_8bit load_in_4bit bits qlora quant_bits quant_method quantization_method": (
        "compute_type: wint8, wint4 or nf4 stores the base in 8 or 4 bits, with fine_tuning: LoRA"
    ),
    "torch_dtype dtype precision mixed_precision tf32 pure_bf16": "compute_type takes bf16, fp16 or fp32",
    "flash_attn use_flash_attn attention_backend": ("remove it: attention kernels are chosen by what the device has"),
    "enable_liger_kernel use_unsloth use_liger_kernel": "remove it: fused kernels are used where the device has them",
    "disable_gradient_checkpointing": "recompute: False is the default",
    "train_from_scratch": "continue_training: False starts from random weights",
    "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_parameters": (
        "frozen_parameters names what is not trained"
    ),
    "freeze_vision_tower freeze_vit": "freeze_config: freeze_vision leaves the vision transformer as it is",
    "freeze_language_model freeze_llm": "freeze_config: freeze_lm leaves the decoder as it is",
    "freeze_multi_modal_projector freeze_aligner": "frozen_parameters: resampler leaves the resampler as it is",
    "vit_lr aligner_lr": "vit_lr_ratio and resampler_lr_ratio are shares of learning_rate",
    "media_dir image_dir image_folder": "paths of pictures are relative to the data file's directory",
    "use_mora lora_use_mixer pissa pissa_init oft_rank oft_block_size oft_target": (
        "adapters are LoRA, rsLoRA (rslora) or DoRA (use_dora)"
    ),
    "export_quantization_bit": "quantization names the scheme of exported weights",
    "reward_model reward_model_adapters reward_model_type": (
        "stage: RM trains one; stage: RL uses it with reward_funcs: reward_model and reward_model_path"
    ),
    "export_dir": "`erniekit export` writes to export/ in output_dir",
    "disable_shuffling": "random_shuffle: False keeps the order of the files",
    "plot_loss": "remove it: loss.png is always drawn",
    "overwrite_cache": "remove it: there is no cache of encoded data",
    "tokenized_path dataset_prepared_path": "remove it: data is encoded as it is read; `erniekit tokenize` does it "
    "beforehand for pretraining (dataset_type: pretrain)",
    "use_kv_cache": "remove it: generation always uses a KV cache",
    "streaming": "remove it: data is always read as it is needed",
    "max_samples max_train_samples": "max_steps limits training, max_evaluate_steps evaluation",
    "train_task rlhf_type trainer trainer_type training_stage": _STAGES,
    "task": f"{_STAGES}; for `erniekit eval` eval_benchmark takes {join_names(BENCHMARKS, 'or')}",
    "lang": "remove it: a benchmark has prompts in one language",
    "ref_model ref_model_name_or_path reference_model ref_model_adapters": (
        "the reference is the model as it was before training, with the adapter of lora_path if there is one"
    ),
    "precompute_ref_log_probs": "ref_logps_cache names the file for the reference's log-probabilities",
    "use_muon": "optim: muon",
    "use_galore galore_target galore_rank use_apollo apollo_target use_badam badam_mode use_adam_mini "
    "optim_target_modules": "optim takes adamw, adamw_custom or muon",
    "do_sample": "temperature: 0 always takes the likeliest token",
    "num_beams": "there is no beam search; temperature: 0 always takes the likeliest token",
    "system default_system system_prompt": "give each record its system text",
    "train_on_prompt mask_history mask_prompt train_on_inputs assistant_only_loss completion_only_loss": (
        "answers alone are trained; a record's `label` leaves out some of them"
    ),
    "label_smoothing_factor": "smoothing of the next-token loss is not built; label_smoothing is for stage: DPO",
    "push_to_hub hub_model_id": "uploading is not built; upload output_dir with the Hub's own tool",
    "wandb use_wandb swanlab use_swanlab": "use report_to: wandb or swanlab; several names may be a list",
    "wandb_mode swanlab_mode offline_tracking": "set WANDB_MODE or SWANLAB_MODE in the environment",
    "swanlab_api_key": "run `swanlab login`, or set SWANLAB_API_KEY in the environment",
    "trackio_space_id mlflow_tracking_uri": "set TRACKIO_SPACE_ID or MLFLOW_TRACKING_URI in the environment",
    "nproc_per_node num_processes n_gpu gpus devices": (
        "the number of processes is the product of the parallel degrees"
    ),
    "group_by_length length_column_name": "packing: True leaves no padding",
    "save_safetensors": "remove it: weights are always saved as safetensors",
    "include_tokens_per_second include_num_input_tokens_seen": "remove it: metrics.jsonl always has both",
    "trust_remote_code": "remove it: no code of a model is run",
    "adam_betas betas": "adam_beta1 and adam_beta2",
    "generation_batch_size": "rollout_batch_size counts prompts; theirs counts completions, num_generations of each",
    "ppo_buffer_size": "rollout_batch_size is the number of prompts of a rollout",
    "ppo_mini_batch_size": "steps_per_generation is the number of optimizer steps of a rollout",
    "advantage_estimator adv_estimator norm_adv_by_std_in_grpo": (
        "scale_rewards: group, none (without the standard deviation) or rloo says what advantages are"
    ),
    "use_kl_loss kl_loss_type kl_penalty": "kl_coef above 0 adds the divergence that kl_estimator (k1, k2, k3) names",
    "vllm_importance_sampling_mode vllm_importance_sampling_correction rollout_importance_sampling_mode rollout_is": (
        "rollout_correction: icepop, tis, mis or misc, with bounds of their own (docs/rl.md)"
    ),
    "filter_groups": "dynamic_sample: True, with max_resample_times",
    "overlong_buffer": "soft_max_length and soft_cache_length",
    "max_tool_calling_iterations": "max_turns counts the turns of the model, the last one without calls",
    "external_plugins": "reward_funcs: path.py:name is a function of your own",
    "use_vllm vllm_mode": "rollouts are made by this project's engine, or by the server of rollout_base_url",
    "seq_kd": "write the teacher's answers to a file once, and train on them with stage: SFT",
    "critic critic_model value_model vf_coef lam gae_lambda whiten_rewards": (
        "there is no critic: advantages are those of a prompt's completions (rl_algorithm)"
    ),
}

_TABLE = {name: f"did you mean {key}?" for key, names in _SAME.items() for name in names.split()} | {
    name: what for names, what in _OTHERWISE.items() for name in names.split()
}


def hint(name: str, known: Iterable[str]) -> str:
    """A suggestion for an unknown key: our name for it, the known name that it resembles, or nothing."""
    name = name.strip().lower().replace("-", "_")
    candidates = list(known)
    if name in candidates:
        return f"did you mean {name}?"
    if name in _TABLE:
        return _TABLE[name]
    near = difflib.get_close_matches(name, [*candidates, *_TABLE], n=1, cutoff=_CLOSE)
    if not near:
        return ""
    return _TABLE.get(near[0], f"did you mean {near[0]}?")


def table() -> dict[str, str]:
    """Every name of this table with its hint."""
    return dict(_TABLE)


def same() -> dict[str, str]:
    """The names whose values mean the same: their name -> ours."""
    return {name: key for key, names in _SAME.items() for name in names.split()}
