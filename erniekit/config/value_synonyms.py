"""Values in LLaMA-Factory, TRL, ms-swift, verl and PaddleFormers that are written in another way here. They are not
accepted; the error about an unknown value says what to write instead.
"""

_KTO = "judged answers have stage: KTO, with kto_loss_type: {}"
_STAGE_OF_LOSS = "stage: DPO with loss_type: {}"
_STAGE_OF_POLICY = "stage: RL with rl_algorithm: {}"

# Key -> value elsewhere -> what to write here.
_INSTEAD: dict[str, dict[str, str]] = {
    "stage": {
        **{name: _STAGE_OF_POLICY.format(name) for name in ("grpo", "gspo", "dapo", "cispo", "ppo")},
        **{name: _STAGE_OF_LOSS.format(name) for name in ("orpo", "simpo", "ipo")},
        "rlhf": "stage: DPO for pairs, KTO for judged answers, RL for rewards",
        "reward": "stage: RM",
        "cpt": "stage: PT",
    },
    "loss_type": {
        "dpo": "DPO's loss is sigmoid",
        "cdpo": "conservative DPO is sigmoid with label_smoothing",
        "odpo": "ODPO is sigmoid with offset_alpha",
        "rpo": "RPO is sigmoid with sft_loss_ratio",
        "sft": "the next-token loss of the chosen answers is sft_loss_ratio",
        "rso": "RSO's loss is hinge",
        "kto": _KTO.format("kto"),
        "apo_zero_unpaired": _KTO.format("apo_zero_unpaired"),
    },
    "kto_loss_type": {
        "kto_pair": "pairs have stage: DPO with loss_type: kto_pair",
        "apo_zero": "judged answers have apo_zero_unpaired, pairs stage: DPO with loss_type: apo_zero",
    },
    "scale_rewards": {"true": "TRL's true is group", "false": "TRL's false is none", "std": "it is group"},
    "kl_estimator": {"kl": "verl's kl is k1", "mse": "verl's mse is k2", "low_var_kl": "verl's low_var_kl is k3"},
    "fine_tuning": {
        "qlora": "it is LoRA with a quantised base (compute_type, docs/low-bit.md)",
        "dora": "it is LoRA with use_dora: true",
    },
    "optim": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "it is adamw"),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "it is adamw with moment_dtype: 8bit"),
    },
    "lr_scheduler_type": {
        "cosine_with_min_lr": "it is cosine, which ends at min_lr",
        "warmup_stable_decay": "it is wsd:N, which decays from step N on",
    },
    "freeze_config": {
        "freeze_llm": "it is freeze_lm",
        "freeze_aligner": "frozen_parameters: resampler leaves the resampler as it is",
    },
    "fp8": {"true": "a recipe is named, such as blockwise"},
    "train_dataset_type": {"openai": "it is messages"},
    "eval_dataset_type": {"openai": "it is messages"},
}


def hint(key: str, value: str) -> str:
    """What to write instead of a value that other toolkits have for a key; "" if this table has none."""
    return _INSTEAD.get(key, {}).get(value.strip().lower(), "")


def table() -> dict[str, dict[str, str]]:
    """Key -> value elsewhere -> what to write here."""
    return {key: dict(values) for key, values in _INSTEAD.items()}
