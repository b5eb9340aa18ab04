"""Compares the configuration and data of a checkpoint with those of the run that continues from it.

DECISIONS defines for every key what a difference means. Files that keys name are compared by their content: the base
model's config.json and weights here; data, tokenizer and chat template by the loader (`Loader.changes`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.model_dir import list_checkpoints
from erniekit.checkpoint.model_shape import model_config
from erniekit.config.fields import from_saved
from erniekit.config.methods import option_names
from erniekit.config.schema import GROUPS, Config, fields
from erniekit.data.loader import StepSource
from erniekit.training.lr_scheduler import build_schedule
from erniekit.training.state import TrainState
from erniekit.utils.errors import CheckpointError


class Decision(Enum):
    """What happens if a key's value differs from the one that the checkpoint was saved with."""

    REFUSE = "the checkpoint belongs to another run, or its tensors mean something else"
    DATA = "the position in the data means something else: refused, unless ignore_data_skip gives the position up"
    CONTENT = "a name: what it names is compared; refused only where the checkpoint does not know that"
    SAY = "the run continues otherwise than it began: logged as key: old -> new"
    IGNORE = "the trained weights do not depend on it, or another message says it"


_KEYS = {
    Decision.REFUSE: """
        continue_training stage fine_tuning rope_theta rope_scaling num_nextn_predict_layers moe_group_experts
        vision_experts_from_text vision_experts_down_scale
        freeze_config frozen_parameters
        lora_rank lora_alpha rslora rslora_plus use_dora lora_target_modules modules_to_save lora_path
    """,
    Decision.DATA: """
        train_dataset_type train_dataset_prob dataset_type split isolate_documents long_document_min_tokens
        long_document_weight max_seq_len truncation mix_strategy random_shuffle packing greedy_intokens buffer_size
        max_prompt_len seed max_completion_length rl_stages upo_offline_pairs
        adaptive_max_imgtoken_option adaptive_max_imgtoken_rate
        min_pixels max_pixels video_min_pixels video_max_pixels video_fps video_min_frames video_max_frames
        video_target_frames video_frames_sample render_timestamp apply_exif missing_media_tags box_coordinates
        position_rule text_dataset_type text_dataset_prob modality_ratio modality_interleave
    """,
    Decision.CONTENT: """
        model_name_or_path train_dataset_path text_dataset_path upo_offline_path input_dir chat_template
    """,
    Decision.SAY: """
        allow_urls max_decoded_pixels video_decode_seconds
        eval_dataset_type eval_dataset_path on_bad_line num_samples_each_epoch max_estimate_samples
        compute_type fused_operators amp_master_grad emulate_precision matmul_precision scale_loss moment_dtype
        loss_subbatch_seqlen z_loss_lambda
        multi_token_pred_lambda
        moe_aux_loss_lambda moe_z_loss_lambda moe_orthogonal_loss_lambda moe_use_aux_free moe_use_aux_free_update_coef
        moe_capacity_factor moe_gate_lr_ratio vit_lr_ratio visual_ld resampler_lr_ratio
        lora_dropout lora_plus_scale
        qat apply_hadamard hadamard_block_size apply_online_actscale_step actscale_moving_rate quant_input_grad
        quant_weight_grad qat_distill_weight quantization_group_size
        fp8 fp8_modules fp8_scale fp8_gradients fp8_store fp8_recompute_up_gate_layers fp8_routing_weight
        loss_type beta label_smoothing pref_loss_ratio sft_loss_ratio offset_alpha simpo_gamma dpop_lambda
        normalize_logps reference_free ref_model_update_steps
        rl_algorithm rl_loss_type importance_sampling_level epsilon epsilon_high delta scale_rewards
        num_generations rollout_batch_size steps_per_generation num_iterations
        kl_coef kl_estimator kl_in_reward kl_bias_correction sync_ref_model ref_model_sync_steps ref_model_mixup_alpha
        rollout_seed rollout_dtype mask_truncated_completions soft_max_length soft_cache_length
        rollout_correction icepop_alpha icepop_beta tis_cap mis_cap off_policy_mask_threshold
        entropy_coef top_entropy_quantile router_replay freeze_router_bias
        upo_weight upo_beta upo_margin upo_reference upo_offline_weight upo_offline_type
        reward_margin center_rewards_coefficient
        reward_funcs reward_weights answer_key reward_timeout reward_on_failure domain_normalize
        reward_min_length reward_max_length cosine_max_length reward_language reward_coordinates
        code_time_limit code_memory_mb code_score judge_model judge_prompt judge_max_score reward_model_path
        max_new_tokens temperature top_p top_k repetition_penalty enable_thinking
        tools max_turns max_tool_calls max_tool_tokens tool_timeout document_search_path
        kto_loss_type desirable_weight undesirable_weight teacher_model_name_or_path gkd_beta lmbda
        dynamic_sample max_resample_times difficulty_low difficulty_high difficulty_metric difficulty_pause
        difficulty_momentum difficulty_weighting difficulty_floor rl_stage_steps
        do_eval batch_size gradient_accumulation_steps num_train_epochs max_steps evaluation_strategy eval_steps
        max_evaluate_steps save_format load_best_model_at_end metric_for_best_model greater_is_better
        early_stopping_patience
        learning_rate min_lr lr_scheduler_type decay_function decay_steps warmup_steps warmup_ratio num_cycles power
        lr_end weight_decay optim muon_momentum muon_ns_steps muon_version muon_extra_scale_factor
        muon_qkv_update_mode muon_ffn_split adam_beta1 adam_beta2 adam_epsilon max_grad_norm
        layerwise_lr_decay_bound ema_decay
        batch_size_warmup_steps neftune neftune_noise_alpha token_balance_loss
        attention_probs_dropout_prob dropout_warmup_steps
    """,
    # The shape is compared as the base model's config.json, the tokenizer by its content.
    # The degrees are logged as the layout; recomputation, stages and sharding change no result.
    Decision.IGNORE: """
        hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
        tie_word_embeddings use_bias initializer_range moe_num_experts moe_k moe_intermediate_size
        moe_num_shared_experts moe_layer_start_index moe_layer_end_index moe_layer_interval tokenizer_name_or_path
        vision_config_path
        fp8_statistics_steps
        eval_dataset_prob dataloader_num_workers prefetch_factor download_hub
        recompute recompute_granularity recompute_modules offload_activations use_recompute_moe use_recompute_mtp
        no_recompute_layers
        ref_logps_cache
        do_train save_strategy save_steps save_total_limit use_async_save logging_steps logging_dir report_to
        run_name project output_dir
        overwrite_output_dir disable_tqdm profile profile_step_start profile_step_end
        resume_from_checkpoint ignore_load_lr_and_optim ignore_save_lr_and_optim ckpt_quant_stage
        ignore_data_skip offload_optim tensorwise_offload_optimizer
        tensor_parallel_degree sequence_parallel pipeline_parallel_degree virtual_pp_degree pp_seg_method
        pipeline_schedule expert_parallel_degree context_parallel_degree cp_comm_type data_parallel_degree
        sharding sharding_parallel_degree balance_pictures
        distributed_timeout rendezvous_timeout max_restarts elastic check_replicas_steps
        reward_workers reward_max_failures code_sandbox code_network
        rollout_base_url rollout_model rollout_update_command rollout_timeout rollout_max_retries rollout_tolerance
        judge_base_url judge_concurrency judge_timeout judge_max_retries judge_cache
        rollout_max_running log_completions num_completions_to_print print_completions_steps
        min_tokens frequency_penalty presence_penalty stream chat_tools image_search_dir max_tool_rounds
        predict_with_generate eval_output checkpoint
        eval_benchmark eval_benchmark_path num_fewshot eval_benchmark_mode eval_chat_template
        format max_shard_size copy_tokenizer
        host port served_model_name lora_modules lora_directory max_model_len max_num_seqs max_num_batched_tokens
        num_speculative_tokens
        max_waiting_requests queue_timeout request_timeout max_request_mb max_request_images
        api_key_file allowed_hosts
        quantization quantization_first_layers quantization_clip_search quantization_eval
        quantization_algorithm quantization_calibration_path quantization_calibration_type
        quantization_calibration_samples quantization_calibration_length quantization_calibrate_all_experts
        quantization_damping quantization_act_order quantization_smoothing
    """,
}
DECISIONS: dict[str, Decision] = {key: decision for decision, keys in _KEYS.items() for key in keys.split()}

_LORA = set(option_names(GROUPS["LoRA"]))
_TOKEN_FILES = {"input_dir", "split", "isolate_documents", "long_document_min_tokens", "long_document_weight"}
_TEXT = {
    "train_dataset_path",
    "train_dataset_type",
    "train_dataset_prob",
    "truncation",
    "mix_strategy",
    "packing",
    "chat_template",
}
_SAMPLING = {"temperature", "top_p", "top_k", "repetition_penalty", "enable_thinking"}
_CONDITIONS: tuple[tuple[set[str], Callable[[Config], bool]], ...] = (
    (_LORA, lambda cfg: cfg.fine_tuning == "LoRA"),
    (_TOKEN_FILES, lambda cfg: cfg.dataset_type == "pretrain"),
    (_TEXT, lambda cfg: cfg.dataset_type != "pretrain"),
    ({"train_dataset_prob"}, lambda cfg: cfg.mix_strategy != "concat"),
    ({"greedy_intokens"}, lambda cfg: cfg.packing),
    ({"buffer_size"}, lambda cfg: cfg.packing and cfg.greedy_intokens),
    (_SAMPLING, lambda cfg: bool(cfg.method.also_reads)),
    ({"num_train_epochs"}, lambda cfg: cfg.max_steps <= 0),
)


def is_read(key: str, cfg: Config) -> bool:
    """Whether a run of this method and kind of data reads the key at all."""
    return cfg.method.reads(key) and all(condition(cfg) for keys, condition in _CONDITIONS if key in keys)


def noted(cfg: Config) -> dict[str, Any]:
    """The values that a checkpoint stores for this comparison."""
    values = asdict(cfg)
    kept = {key: values[key] for key in fields() if DECISIONS[key] is not Decision.IGNORE}
    return kept | {"dataset_type": "pretrain" if cfg.dataset_type == "pretrain" else "iterable"}  # map is the same


def base_of(cfg: Config, model_dir: Path) -> dict[str, Any]:
    """The identity of the base model, independent of its path: its shape, and a hash of some of its weights."""
    weights = fingerprint(model_dir) if cfg.continue_training else "random"
    config: dict[str, Any] = json.loads(json.dumps(model_config(cfg, model_dir).to_dict("pt")))
    return {"weights": weights, "config": config}


# how the names of values begin that are stored as hashes
_HASHED = ("content of", "tokenizer", "chat template", "weights of model_name")


@dataclass(frozen=True)
class Present:
    """The present values of the run."""

    cfg: Config
    base: dict[str, Any]
    loader: StepSource


@dataclass(frozen=True)
class Difference:
    """One value that has changed."""

    name: str
    then: Any
    now: Any
    decision: Decision

    def __str__(self) -> str:
        return f"{self.name}: {self.then} -> {self.now}"

    def refusal(self) -> str:
        """The line of an error."""
        there, here = (f"hash {v}" if self.name.startswith(_HASHED) else repr(v) for v in (self.then, self.now))
        return f"  {self.name}: {there} there, {here} here"


def differences(state: TrainState, now: Present) -> list[Difference]:
    """All differences between the run that saved `state` and this one, each with its decision."""
    data = now.loader.changes(state.data) if state.data else {}
    data_then = state.data.get("data")
    known = data_then if isinstance(data_then, dict) else {}
    same_content = {
        "model_name_or_path": bool(state.base),
        "train_dataset_path": "content of train_dataset_path" in known,
        "text_dataset_path": "text: content of train_dataset_path" in known,
        "input_dir": "content of each file" in known,
        "chat_template": "chat template" in known,
    }
    found = _of_keys(state.identity, now.cfg, same_content)
    found += _of_base(state.base, now.base)
    named = {difference.name for difference in found}
    found += [
        Difference(key, *values, Decision.DATA)
        for key, values in data.items()
        if key not in named or DECISIONS[key] is Decision.CONTENT
    ]
    if now.cfg.ignore_data_skip:
        found = [replace(d, decision=Decision.SAY) if d.decision is Decision.DATA else d for d in found]
    return found


def _of_keys(identity: Mapping[str, Any], cfg: Config, same_content: Mapping[str, bool]) -> list[Difference]:
    """`same_content`: of the keys that name something, whether it is compared by its content elsewhere."""
    found = []
    for key, value in noted(cfg).items():
        then = from_saved(fields()[key], identity[key]) if key in identity else value
        if then == value or not is_read(key, cfg):
            continue
        decision = DECISIONS[key]
        if decision is Decision.CONTENT:
            unknown = Decision.REFUSE if key == "model_name_or_path" else Decision.DATA
            decision = Decision.SAY if same_content[key] else unknown
        found.append(Difference(key, then, value, decision))
    return found


def _of_base(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    if not then:
        return []
    pairs = [("weights of model_name_or_path", then.get("weights"), now["weights"])]
    before = then.get("config")
    config: dict[str, Any] = before if isinstance(before, dict) else {}
    pairs += [
        (f"model_name_or_path: config.json: {key}", config.get(key), now["config"].get(key))
        for key in {**config, **now["config"]}
    ]
    return [Difference(*pair, Decision.REFUSE) for pair in pairs if pair[1] != pair[2]]


def check_keys(identity: Mapping[str, Any], cfg: Config, where: Path) -> None:
    """Compare the configuration only, as `check` does, before data and model are opened."""
    named = {key: True for key, decision in DECISIONS.items() if decision is Decision.CONTENT}
    found = _of_keys(identity, cfg, named)
    if cfg.ignore_data_skip:
        found = [difference for difference in found if difference.decision is not Decision.DATA]
    _refuse(found, cfg, where)


def check(state: TrainState, now: Present, where: Path) -> None:
    """Refuse to continue from a checkpoint of another run, or at a position in other data, with the differences in the
    message. Nothing is changed.
    """
    if not state.data and not now.cfg.ignore_data_skip:
        raise CheckpointError(
            f"{where} does not say how far in the data it is. Set ignore_data_skip: true to read the data from the "
            "beginning."
        )
    _refuse(differences(state, now), now.cfg, where)


def _refuse(found: list[Difference], cfg: Config, where: Path) -> None:
    refused = [d for d in found if d.decision in (Decision.REFUSE, Decision.DATA)]
    if not refused:
        return
    lines = "\n".join(d.refusal() for d in refused)
    only_data = all(d.decision is Decision.DATA for d in refused)
    can_continue = only_data and (where.is_dir() or bool(list_checkpoints(where.parent)))
    anew = ", or set ignore_data_skip: true to continue its weights at the beginning of this data" * can_continue
    asked = cfg.resume_from_checkpoint
    if asked not in ("auto", "none") and Path(asked).expanduser().resolve() == where.resolve():
        raise CheckpointError(
            f"resume_from_checkpoint: {where} is of another run:\n{lines}\n"
            f"Set these as they were{anew}. To start a new run from its weights, set model_name_or_path to it."
        )
    raise CheckpointError(
        f"output_dir: {where.parent} holds another run ({where.name}):\n{lines}\n"
        f"Give this run another output_dir{anew}, or set overwrite_output_dir: true to remove that run."
    )


def changed_lines(state: TrainState, now: Present, where: Path, complete: bool) -> list[str]:
    """Log lines about the differences with which the run can continue."""
    said = [str(d) for d in differences(state, now) if d.decision is Decision.SAY]
    unknown = [key for key in noted(now.cfg) if key not in state.identity]
    lines = []
    if said:
        effect = "without effect, since no step is left to train" if complete else f"changed since {where.name}"
        lines.append(f"{effect}: {'; '.join(said)}")
    if unknown or not state.base:
        lines.append(
            f"{where.name} was saved by an earlier version, which did not note all that results depend on: "
            "changes in these cannot be detected"
        )
    return lines


def rate_line(state: TrainState, cfg: Config, max_steps: int) -> str | None:
    """How the next step's learning rate differs from the one that was planned when `state` was saved, if it does: the
    schedule is a function of the step and of the last step, so both another schedule and another end move it.
    """
    if state.max_steps is None or state.step >= max_steps:
        return None
    known = {key: value for key, value in state.identity.items() if key in fields()}
    before, after = state.max_steps, build_schedule(cfg, max_steps)(state.step)
    try:
        planned = build_schedule(replace(cfg, **known), before)(state.step)
    except (ValueError, TypeError, AttributeError, ArithmeticError):  # an invalid value in trainer_state.json
        return None
    if planned == after:
        return None
    end = f"the last step is {max_steps}" + (f", before {before}" if before != max_steps else "")
    over = ", when the schedule had ended" if state.step >= before else ""
    return (
        f"learning rate of step {state.step + 1}: {planned:.4g} -> {after:.4g}{over} ({end}; the schedule is computed "
        "from step 1 with the values given now)"
    )
