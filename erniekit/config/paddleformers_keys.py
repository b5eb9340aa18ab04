"""The rules of keys that only PaddleFormers has (ERNIEKit's successor, with Megatron-LM's names); compat.py describes
the kinds of rule.
"""

from erniekit.config import compat
from erniekit.config.compat import DATA, EVERY, WRITE, Alias, Fixed, Later

ALIASES: dict[str, Alias] = {
    "tensor_model_parallel_size": Alias("tensor_parallel_degree"),
    "pipeline_model_parallel_size": Alias("pipeline_parallel_degree"),
    "virtual_pipeline_model_parallel_size": Alias("virtual_pp_degree"),
    "expert_model_parallel_size": Alias("expert_parallel_degree"),
    "context_parallel_size": Alias("context_parallel_degree"),
    "sharding_parallel_size": Alias("sharding_parallel_degree"),
    "data_parallel_size": Alias("data_parallel_degree"),
    "moe_router_bias_update_rate": Alias("moe_use_aux_free_update_coef"),
    "router_aux_loss_coef": Alias(
        "moe_aux_loss_lambda",
        remark="moe_aux_loss_lambda: the balancing losses of all sparse layers are added up, as in PaddleFormers; "
        "transformers' coefficient of this name weighs their mean",
    ),
    "eval_with_do_generation": Alias("predict_with_generate"),
    "recompute_mtp_granularity": Alias("use_recompute_mtp", compat.is_given),
}

# Reason -> the keys that have no effect for that reason. Keys of a reason in compat_keys.py are added to its own.
NO_EFFECT: dict[str, str] = {
    "attention kernels are chosen by what the device has": (
        "_attn_implementation attn_impl fa_version use_attn_mask_startend_row_indices"
    ),
    "fused kernels are used where the device has them": (
        "moe_expert_fusion moe_deep_gemm using_sonic_moe use_fast_layer_norm enable_linear_fused_grad_add "
        "mp_fused_linear_param_grad_add transpose_split_quant"
    ),
    "recompute_granularity decides what is recomputed, layer by layer: the result is the same": (
        "recompute_method recompute_num_layers recompute_mtp_method recompute_mtp_modules"
    ),
    "checkpoints are always whole tensors in safetensors, written by all ranks together": (
        "save_checkpoint_format load_checkpoint_format load_via_cpu flex_ckpt_comm_method replicate_saved_into_local "
        "using_flex_checkpoint load_from_hf"
    ),
    "every checkpoint is a model directory in Hugging Face's layout": (
        "save_hf_steps save_hf_total_limit save_hf_memory_growth_threshold"
    ),
    "the last step is always saved": "save_last_step",
    "config.json, the tokenizer's files, the chat template and generation_config.json are always copied; copy others "
    "by hand": "copy_custom_file_list",
    "averaged weights are a model directory of their own": "online_merge_ema",
    "what parallel ranks exchange, and when, follows from the degrees": (
        "split_param best_unbalanced_scheduler overlap_p2p_comm batch_p2p_comm non_batch_p2p_comm partial_send_recv "
        "p2p_cache_shape variable_seq_lengths clear_every_step_cache reorder_pipeline_priority timer "
        "dp_comm_overlap pp_sharding_comm_overlap sd_sharding_comm_overlap sd_shardingv1_comm_overlap "
        "tp_async_allreduce sp_async_reduce_scatter mp_async_allreduce mp_skip_c_identity stage1_tensor_fusion "
        "stage1_overlap stage2_overlap stage1_broadcast_overlap stage1_allgather_overlap stage1_reduce_avg "
        "fuse_optimizer_states send_recv_overlap sharding_comm_group_call_opt nccl_comm_group_config"
    ),
    "cp_comm_type decides how context ranks divide their work, and tokens are always divided into an early and a late "
    "chunk for each": "cp_balance_mode",
    "copies on several ranks stay equal, which check_replicas_steps verifies": (
        "tp_sync_param tp_sync_moment pp_sync_param pp_sync_moment sync_grad"
    ),
    "pipeline_schedule and virtual_pp_degree decide the order of the passes": (
        "use_dualpipev forward_backward_overlap_scheduler split_backward pipeline_schedule_mode n_microbatches"
    ),
    "gradients are summed over the whole step and divided once": (
        "pp_delay_scale_loss tp_delay_scale_loss gradient_sync_after_accumulate"
    ),
    "gradients are freed after every step": "pp_release_grads sd_release_grads",
    "offload_optim and tensorwise_offload_optimizer decide where the optimizer's state is": (
        "offload_queue sharding_offload_opt_buffersize_GB offload_fp8_expert_master_weight"
    ),
    "a document is never cut to fill a row": "truncate_packing",
    "records are encoded as they are read, by dataloader_num_workers processes": (
        "dataset_num_proc dataset_batch_size dataset_kwargs"
    ),
    "token files are mapped, not read ahead": "skip_warmup warmup_only_rank0",
    "files are found under their paths on every host": "share_folder",
    "the number of steps is measured on the data itself": "estimation_output_file autotuner_benchmark",
    "stage decides what the loss is": "model_with_dpo_criterion",
    "training keeps no cache of keys and values": "use_cache",
    "on a CPU a run repeats bit for bit; on a GPU Paddle's flags decide, in the environment": "deterministic_mode",
    "models of ERNIE 4.5 have no such part": "dsa_indexer_loss_coeff",
    "a parameter's role decides: embeddings, head, norms, biases and routers are AdamW's, all other matrices Muon's": (
        "muon_exclude_patterns"
    ),
    "no token is dropped unless moe_capacity_factor is given": "moe_capacity",
    "there is no clipping that adapts itself": (
        "adaptive_norm_clip_ratio adaptive_norm_clip_force_clear_state adaptive_norm_clip_enable_record "
        "adaptive_norm_force_clear_state adaptive_norm_enable_record"
    ),
    "a loss or gradient that is not finite stops the run": "loss_spike_settings",
    "Paddle's flags are set in the environment": "FLAGS_use_stride_kernel",
}

# A feature that is not built -> the keys that are options of that feature only.
DETAILS: dict[str, str] = {
    "internal_medicine_monitors": "internal_medicine_monitor_interval",
    "enable_auto_parallel: True": (
        "auto_parallel_sync_shared_params use_intermediate_api tensor_fusion overlap replace_with_c_embedding "
        "replace_with_parallel_cross_entropy dp_allreduce_avg_in_gradinent_scale sp_allreduce_avg_in_gradinent_scale"
    ),
    "make_offline_data: True": "dataset_output_dir packed_idx_cache_dir data_cache",
}

LATER: dict[str, Later] = {
    "freeze_training": Later("training one part; frozen_parameters names what is not trained", commands=("train",)),
    "train_mtp_only": Later("training one part; frozen_parameters names what is not trained", commands=("train",)),
    "mtp_distillation_loss": Later("distillation of multi-token prediction", commands=("train",)),
    "mtp_num_layers": Later("several steps through one multi-token-prediction block", safe=(1,), commands=("train",)),
    "mtp_attention_flexible": Later("other attention masks in multi-token prediction", commands=("train",)),
    "hybrid_parallel_expert_grad_scale": Later("scaled gradients of experts", safe=(1,), commands=("train",)),
    "zcc_ema_loss_threshold": Later("averaging weights only below a loss", commands=("train",)),
    "ignore_eos_token": Later("answers without their end token", commands=DATA),
    "make_offline_data": Later("data sets prepared offline", commands=DATA),
    "aoa_config": Later("mappings between the names of weights", commands=EVERY),
    "merge_with_qdq_base_model": Later("merging into a quantised base", commands=WRITE),
    "dev_data": Later("pretraining data in HDF5 (use input_dir)", commands=DATA),
}

DEGREES: dict[str, str] = {
    "expert_tensor_model_parallel_size": "tensor parallelism of its own for experts",
    "sep_parallel_size": "heads exchanged for tokens: context_parallel_degree with cp_comm_type: a2a does that",
}

FIXED: dict[str, Fixed] = {
    "use_template": Fixed((True,), "answers are always trained behind the chat template; for plain text set stage: PT"),
    "use_global_causal_attn": Fixed((False,), "documents that share a row never see one another; remove it"),
    "muon_ns_coeff_type": Fixed(("simple",), "Newton-Schulz steps have the coefficients of `simple`; remove it"),
    "muon_ns_coeffs": Fixed((), "Newton-Schulz steps have the published coefficients; remove it"),
    "data_impl": Fixed(("mmap",), "token files are mapped (a .bin and an .idx); remove it"),
    "dataset_text_field": Fixed(("text",), "the text of a pretraining record stands in `text` (or in `tgt`)"),
    "resume_from_huggingface_ckpt": Fixed((), "give that directory as model_name_or_path"),
    "sharded_model_from_ema": Fixed((False,), "averaged weights are in ema/: give it as model_name_or_path"),
}

# The keys that no other toolkit has: a file that gives one was written for PaddleFormers.
MARKS = (
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "expert_model_parallel_size sharding_parallel_size _attn_implementation attn_impl save_checkpoint_format "
    "load_checkpoint_format recompute_method recompute_num_layers copy_custom_file_list truncate_packing "
    "best_unbalanced_scheduler overlap_p2p_comm split_param moe_router_bias_update_rate moe_expert_fusion "
    "use_attn_mask_startend_row_indices template_backend"
).split()
