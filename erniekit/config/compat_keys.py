"""The rules of all keys without a field (compat.py describes the kinds of rule)."""

from erniekit.config import compat, paddleformers_keys, vision_keys
from erniekit.config.compat import DATA, EVERY, RUN, WRITE, Alias, Detail, Fixed, Later, NoEffect, Rule

_ALIASES: dict[str, Alias] = {
    "from_scratch": Alias("continue_training", compat.negated),
    "bf16": Alias("compute_type", compat.bf16_flag),
    "fp16": Alias("compute_type", compat.fp16_flag),
    "weight_quantize_algo": Alias("compute_type", compat.quantisation),
    "use_lowprecision_moment": Alias("moment_dtype", compat.lowprecision_moment),
    "use_recompute": Alias("recompute"),
    "use_fp8_mlp": Alias("fp8", compat.fp8_flag),
    "dequant_input": Alias("fp8_store"),
    "offload_recompute_inputs": Alias("offload_activations"),
    "recompute_fwd_gate_up": Alias("fp8_recompute_up_gate_layers", compat.layers_or_none),
    "shared_expert": Alias("fp8_modules", compat.fp8_shared),
    "lora": Alias("fine_tuning", compat.lora_flag),
    "use_lora": Alias("fine_tuning", compat.lora_flag),
    "lora_r": Alias("lora_rank"),
    "lora_target": Alias("lora_target_modules", compat.every_module),
    "use_rslora": Alias("rslora"),
    "multi_token_pred_depth": Alias("num_nextn_predict_layers"),
    "per_device_train_batch_size": Alias("batch_size", compat.weak),
    "per_device_eval_batch_size": Alias("batch_size", compat.weaker),
    "eval_iters": Alias("max_evaluate_steps", compat.weak),
    "tokenizer": Alias("tokenizer_name_or_path"),
    "tokenizer_name": Alias("tokenizer_name_or_path"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "max_seq_length": Alias("max_seq_len"),
    "dataloader_shuffle": Alias("random_shuffle"),
    "template": Alias("chat_template"),
    "binpacking": Alias("greedy_intokens"),
    "packing_interval": Alias("buffer_size"),
    "truncation_strategy": Alias("truncation", compat.truncation),
    "eval_strategy": Alias("evaluation_strategy"),
    "sharding_degree": Alias("sharding_parallel_degree"),
    "unified_checkpoint_config": Alias("use_async_save", compat.async_save, compat.other_words),
    "zcc_save_ema_coef": Alias("ema_decay", compat.unless_zero),
}

# Reason -> the keys that have no effect for that reason.
_NO_EFFECT: dict[str, str] = {
    "attention kernels are chosen by what the device has": (
        "use_flash_attention use_mem_eff_attn use_flash_attn_with_mask use_attn_mask_start_row_indices "
        "use_sparse_flash_attn attn_implementation fuse_softmax_mask"
    ),
    "fused kernels are used where the device has them": (
        "fuse_linear fuse_rope fuse_rms_norm fuse_swiglu fuse_gate_detach_matmul use_combine_before_a2a "
        "use_async_a2a use_ep_comm_overlap use_rms_qkv_recompute stack_quant swiglu_probs_bwd spaq split_group_gemm "
        "use_fast_ln"
    ),
    "rows are sent to other ranks' experts in the model's dtype, and quantised there": "use_quant_before_a2a",
    "routed experts in FP8 are one step wherever they have no adapter": "use_fp8_fuse_node",
    "weights are quantised for each product, and no copy in FP8 is kept": (
        "offline_quant_expert_weight clear_origin_weight_when_offline_quant"
    ),
    "head and loss always run only where labels are, a chunk of tokens at a time": (
        "use_sparse_head_and_loss_fn use_fused_head_and_loss_fn use_recompute_loss_fn loss_subbatch_sequence_length"
    ),
    "recompute_granularity decides what is recomputed, always in the one way that takes any input": (
        "recompute_use_reentrant refined_recompute"
    ),
    "this comes from the model's config.json and tokenizer": (
        "bos_token_id eos_token_id pad_token_id max_position_embeddings rope_3d"
    ),
    "the model's config.json says whether it has experts": "use_moe",
    "experts are always divided over the ranks of expert_parallel_degree and of tensor_parallel_degree": (
        "moe_group use_expert_parallel"
    ),
    "experts are dispatched in one way here": (
        "moe_gate moe_with_send_router_loss moe_multimodal_dispatch_use_allgather moe_logging enable_mtp_magic_send "
        "moe_use_all2all moe_token_dispatcher_type"
    ),
    "moe_orthogonal_loss_lambda alone decides": "use_ortho_loss_callback moe_group_orthogonal_loss",
    "both weight layouts are recognised, and save_format decides what is written": (
        "use_huggingface_model convert_from_hf save_to_hf"
    ),
    "checkpoints are always whole tensors in safetensors, written by all ranks together": (
        "unified_checkpoint save_sharded_model load_sharded_model "
        "load_sharded_model_remap_parameter_name save_sharding_stage1_model_include_freeze_params "
        "ordered_save_group_size save_on_each_node force_reshard_pp "
        "auto_parallel_resume_form_hybrid_parallel"
    ),
    "use_async_save alone decides whether checkpoints are written in the background": (
        "enable_zero_cost_checkpoint zcc_workers_num zcc_pipeline_hooks_capacity_usage "
        "flash_device_save_steps output_signal_dir"
    ),
    "ckpt_quant_stage alone decides, and is O0 unless it is given": "disable_ckpt_quant",
    "always saved": "save_tokenizer save_rng_states",
    "a parameter's optimizer state is fetched as a whole": "optim_shard_num",
    "gradients are freed after every step": "release_grads",
    "Python's garbage collector runs as always: the same result": "gc_interval",
    "memory is left to Paddle's allocator": "pre_alloc_memory",
    "which operations run in 16 bits is decided in one place for each kind of layer": (
        "amp_custom_white_list amp_custom_black_list bf16_full_eval fp16_full_eval"
    ),
    "16-bit training keeps 16-bit weights beside fp32 masters (O2)": "fp16_opt_level",
    "averaged weights are updated after every step": "zcc_ema_interval",
    "order and position of the data follow from the seed alone, and a resumed run continues where it was": (
        "same_data sampling_wo_replacement_data_resuming distributed_dataloader use_train_part_sharding "
        "text_use_train_part_sharding shuffle_consecutive num_consecutive data_load_process_num "
        "lazy_data_processing skip_load_data_seq_cache load_args_from_api"
    ),
    "a row is as long as its samples need, up to max_seq_len": (
        "pad_to_max_seqlen padding padding_free base_seq_length"
    ),
    "`packing` decides": "in_tokens_batching",
    "no row is dropped: the last step has the rows that remain": "dataloader_drop_last",
    "the end of an answer is always trained": "mask_out_eos_token",
    "stage: RM alone trains a score head": "use_cls",
    "a record of preference data has two answers": "num_comparisons",
    "the number of steps is measured on the data itself": "num_of_gpus dpo_benchmark",
    "the global batch is batch_size x gradient_accumulation_steps x data ranks": "global_batch_size",
    "templates are always jinja": "template_backend",
    "every answer is trained behind exactly the prompt that it would get": "encode_one_turn split_multi_turn",
    "columns are known by the data's format": "remove_unused_columns label_names",
    "metrics.jsonl records loss, norm, rate, tokens and speed of every step": (
        "enable_global_training_logs log_global_grad_norm global_logging_interval record_optimizer_stat "
        "logging_strategy logging_first_step sft_benchmark count_trained_tokens metrics_output_path "
        "skip_profile_timer skip_memory_metrics enable_timer enable_optimizer_timer"
    ),
    "one process writes the log": "log_on_each_node",
    "a secret in a file would be copied with it: run `wandb login`, or set WANDB_API_KEY": "wandb_api_key",
    "set HTTPS_PROXY in the environment": "wandb_http_proxy",
    "eval_steps decides": "minimum_eval_times",
    "evaluation always sums over all its batches": "eval_accumulation_steps",
    "predict_with_generate decides": "prediction_loss_only",
    "use `erniekit eval` or `erniekit export`": "do_predict do_export",
    "Paddle decides the device: the GPU when it has one; hide it to use the CPU": "no_cuda",
    "the launcher gives each process its number": "local_rank",
    "models run in dynamic graphs": "to_static ddp_find_unused_parameters flatten_param_grads past_index",
    "only for jobs in PaddleCloud": "pdc_download_ckpt pdc_download_timeout",
    "environment variables are set in the shell": "env",
    "`erniekit server` has one port, and its metrics are at /metrics": "metrics_port engine_worker_queue_port",
    "`erniekit server` reads the chat template to know how thoughts and tool calls are written": (
        "reasoning_parser tool_call_parser"
    ),
    "`erniekit server` keeps keys and values in one piece a conversation, as long as it is": (
        "block_size kv_cache_ratio gpu_memory_utilization"
    ),
    "`erniekit server` loads weights in one way, and answers at once": "load_choices use_warmup",
    "`max_request_images` bounds the pictures of a request": "limit_mm_per_prompt",
    "requests say themselves whether usage is sent (stream_options)": "stream_options",
    "what parallel ranks exchange, and when, follows from the degrees": (
        "use_sp_callback fuse_sequence_parallel_allreduce sequence_parallel_config tensor_parallel_config "
        "tensor_parallel_output pipeline_parallel_config disable_pipeline_warmup pp_need_data pp_need_data_degree "
        "sharding_parallel_config sharding_parallel_mesh_dimension sharding_comm_buffer_size_MB "
        "data_parallel_config hybrid_parallel_topo_order split_inputs_sequence_dim split_norm_comm"
    ),
}

# A feature that is not built -> the keys that are options of that feature only.
_DETAILS: dict[str, str] = {
    "use_fp8: True": "fp8_format_type fp8_force_clear_state enable_fp8_quantize_analysis",
    "self_constraint_cpt: True": "prob_nums cpt_kl_ratio pt_kl_ratio cpt_ce_ratio pt_ce_ratio",
}

_LATER: dict[str, Later] = {
    "train_emb_only": Later("training one part; frozen_parameters names what is not trained", commands=("train",)),
    "train_moe_only": Later("training one part; frozen_parameters names what is not trained", commands=("train",)),
    "device": Later(
        "this version runs on CUDA GPUs and on the CPU; leave it out to run there",
        safe=("gpu", "cuda", "cpu", *(f"gpu:{number}" for number in range(8))),
        otherwise="Paddle decides the device: the GPU when it has one; hide it to use the CPU",
    ),
    "hidden_dropout_prob": Later("dropout between layers", commands=("train",)),
    "moe_dropout_prob": Later("dropout in experts", commands=("train",)),
    "use_fp8": Later("FP8 with scales of earlier steps; fp8: tensorwise has those of the present values"),
    "expert_max_capacity": Later("expert capacity", safe=(2**32,)),
    "expert_min_capacity": Later("expert capacity", safe=(1,)),
    "adaptive_norm_clip": Later("adaptive clipping", commands=("train",)),
    "self_constraint_cpt": Later("continued pretraining held near the first model", commands=("train",)),
    "reshard_save_then_exit": Later("re-sharding training checkpoints", commands=("train",)),
    "server_tp_degree": Later("a server on several ranks", safe=(1,), commands=("server",)),
    "skip_data_intervals": Later("skipping intervals of the data", commands=("train",)),
    "offline_dataset_path": Later("data sets prepared offline", commands=DATA),
    "data_filelist": Later("pretraining data in HDF5 (use input_dir)", commands=DATA),
    "data_weights": Later("pretraining data in HDF5 (use input_dir)", commands=DATA),
    "new_special_tokens_path": Later("new special tokens", commands=EVERY),
    "custom_register_path": Later("templates and formats registered by code", commands=DATA),
    "internal_medicine_monitors": Later("monitors inside the layers", commands=("train",)),
    "enable_auto_parallel": Later("automatic parallelism"),
    "hf_hub_id": Later("uploading to a Hub", commands=WRITE),
    "mergekit_task_config": Later("merging models", commands=WRITE),
}

_DEGREES: dict[str, str] = {
    "expert_tensor_parallel_degree": "tensor parallelism of its own for experts",
    "sep_parallel_degree": "heads exchanged for tokens: context_parallel_degree with cp_comm_type: a2a does that",
}

_MAPPING = "expected keys and values, such as {dequant_input: true}"

_TAIL = "add_tail_layers remove_tail_layer num_empty_layers_add_in_tail"


def _table() -> dict[str, Rule]:
    parts: list[dict[str, Rule]] = [
        dict(_ALIASES),
        dict(paddleformers_keys.ALIASES),
        dict(paddleformers_keys.FIXED),
        dict(vision_keys.ALIASES),
        dict(vision_keys.FIXED),
        dict(vision_keys.LATER),
        dict(_LATER),
        dict(paddleformers_keys.LATER),
        {name: Later("layers added or left out at the model's end (num_hidden_layers)") for name in _TAIL.split()},
    ]
    parts.append({name: Fixed((), _MAPPING) for name in ("fp8_mem_configs", "fp8_fused_ops_configs")})
    for no_effect in (_NO_EFFECT, paddleformers_keys.NO_EFFECT, vision_keys.NO_EFFECT):
        parts.append({name: NoEffect(why) for why, names in no_effect.items() for name in names.split()})
    for details in (_DETAILS, paddleformers_keys.DETAILS, vision_keys.DETAILS):
        parts.append({name: Detail(of) for of, names in details.items() for name in names.split()})
    for degrees in (_DEGREES, paddleformers_keys.DEGREES):
        parts.append({name: Later(feature, safe=(1, -1), commands=RUN) for name, feature in degrees.items()})
    joined: dict[str, Rule] = {}
    for part in parts:
        assert not joined.keys() & part.keys(), joined.keys() & part.keys()
        joined |= part
    return joined


# The rule of every key that has no field. Each name appears in one table only.
RULES = _table()

# Keys without an effect whose values are not kept.
SECRETS = frozenset({"wandb_api_key", "wandb_http_proxy"})
