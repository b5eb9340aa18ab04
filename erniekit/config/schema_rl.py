"""Keys of stage RL: the policy loss, what advantages are made of, and how completions are sampled."""

from dataclasses import dataclass
from typing import Any, ClassVar

from erniekit.config.fields import key, list_of
from erniekit.config.schema_data import DATASET_TYPES

# What rl_algorithm stands for: the values of keys that are not given. Sources are in erniekit/losses/policy.py; the
# clip range of gspo is that of its paper's section 5.1, dapo's of its table 1, cispo's upper bound that of
# arXiv 2510.13786.
PRESETS: dict[str, dict[str, Any]] = {
    "gspo": {"rl_loss_type": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "gspo_token": {"rl_loss_type": "gspo_token", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "grpo": {"rl_loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2},
    "dapo": {"rl_loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"rl_loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.2, "scale_rewards": "none"},
    "bnpo": {"rl_loss_type": "bnpo", "epsilon": 0.2, "epsilon_high": 0.2},
    "cispo": {"rl_loss_type": "cispo", "epsilon": 0.2, "epsilon_high": 5.0},
    "ppo": {"rl_loss_type": "ppo", "epsilon": 0.2, "epsilon_high": 0.2},
}
RL_LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gspo_token", "cispo", "ppo")
ROUTER_REPLAYS = ("none", "compare", "r3")
CORRECTIONS = ("none", "tis", "mis", "icepop", "icepop_sequence", "misc")


@dataclass(frozen=True, kw_only=True)
class RLArgs:
    """Reinforcement learning with rewards that are computed (docs/rl.md)."""

    group: ClassVar[str] = "reinforcement learning"

    rl_algorithm: str = key(
        "gspo",
        "Chooses rl_loss_type, epsilon, epsilon_high and scale_rewards where they are not given (docs/rl.md).",
        choices=tuple(PRESETS),
    )
    rl_loss_type: str = key(
        "gspo",
        "The policy loss: where ratios are formed and what is averaged; formulas are in erniekit/losses/policy.py.",
        choices=RL_LOSS_TYPES,
    )
    importance_sampling_level: str | None = key(
        None,
        "Where ratios are formed: of each token, of the whole completion, or of the completion with the gradients of "
        "its tokens; null: as rl_loss_type has it.",
        choices=("token", "sequence", "sequence_token"),
    )
    num_generations: int = key(8, "Completions of each prompt; they are compared with one another.", ge=2)
    rollout_batch_size: int = key(16, "Prompts of one rollout, over all ranks.", ge=1)
    num_iterations: int = key(1, "How often the completions of a rollout are trained on.", ge=1)
    steps_per_generation: int = key(
        1, "Optimizer steps into which the completions of a rollout are divided; each takes whole groups.", ge=1
    )
    epsilon: float = key(
        3e-4,
        "Ratios below 1 - epsilon are clipped where the advantage is negative; 0.0003 is the default of rl_algorithm: "
        "gspo, others have 0.2.",
        gt=0,
        lt=1,
    )
    epsilon_high: float = key(
        4e-4,
        "Ratios above 1 + epsilon_high are clipped where the advantage is positive; with rl_loss_type: cispo the "
        "largest ratio. 0.0004 is the default of rl_algorithm: gspo (docs/rl.md).",
        gt=0,
    )
    delta: float | None = key(
        None, "The largest ratio in the unclipped term, above 1 + epsilon_high (two-sided clipping).", gt=1
    )
    scale_rewards: str = key(
        "group",
        "What the rewards' differences from their group's mean are divided by: the group's or the batch's standard "
        "deviation, or nothing; rloo: the mean is that of the others; gdpo: each reward function is scaled alone.",
        choices=("group", "batch", "none", "rloo", "gdpo"),
    )
    kl_coef: float = key(0.0, "Weight of the divergence from the reference; 0: there is no reference.", ge=0)
    kl_estimator: str = key("k3", "How the divergence is estimated.", choices=("k1", "k2", "k3"))
    kl_in_reward: bool = key(False, "Subtract the divergence from the reward instead of adding it to the loss.")
    kl_bias_correction: bool = key(
        True, "Multiply the estimate by the ratio, so that its gradient is that of the divergence."
    )
    sync_ref_model: bool = key(False, "The reference moves towards the policy.")
    ref_model_sync_steps: int = key(512, "Optimizer steps between two moves of the reference.", ge=1)
    ref_model_mixup_alpha: float = key(
        0.6, "The policy's share in the reference after a move; the rest is the reference before it.", gt=0, le=1
    )
    max_completion_length: int = key(512, "The largest number of tokens of a completion.", ge=1)
    rollout_seed: int | None = key(None, "The seed of the samples; null: seed.", ge=0)
    rollout_max_running: int = key(
        64, "Completions that are generated at a time on one rank, which bounds memory.", ge=1
    )
    rollout_dtype: str | None = key(
        None,
        "bf16: generate with weights that are rounded to bf16, as an engine of another precision would; null: with "
        "the weights that are trained.",
        choices=("bf16",),
    )
    mask_truncated_completions: bool = key(False, "Completions without an end token have no loss.")
    soft_max_length: int | None = key(
        None, "The length from which on a completion has the whole overlong penalty of -1; null: there is none.", ge=1
    )
    soft_cache_length: int | None = key(
        None, "The tokens below soft_max_length over which the overlong penalty grows; null: a fifth of it.", ge=1
    )
    rollout_correction: str = key(
        "none",
        "Weights of the tokens' losses for the difference between the generating and the training computation.",
        choices=CORRECTIONS,
    )
    icepop_alpha: float = key(0.5, "icepop, icepop_sequence, misc: smaller weights become 0.", ge=0)
    icepop_beta: float = key(5.0, "icepop, icepop_sequence, misc: larger weights become 0.", gt=0)
    tis_cap: float = key(2.0, "tis: larger weights become this.", gt=0)
    mis_cap: float = key(3.0, "mis: completions with larger weights have no loss.", gt=0)
    off_policy_mask_threshold: float | None = key(
        None,
        "Completions with a negative advantage have no loss if their log-probability per token has fallen by more "
        "than this since they were sampled.",
        gt=0,
    )
    entropy_coef: float = key(0.0, "Weight of the entropy that is added to the objective.", ge=0)
    top_entropy_quantile: float = key(
        1.0, "The share of tokens with the highest entropy that have a policy loss; 1: all.", gt=0, le=1
    )
    router_replay: str = key(
        "none",
        "Routing replay: with r3 the training passes send each token to the experts that it was sent to while it was "
        "generated, weighed by the present router; compare counts the tokens that are sent to others (docs/rl.md).",
        choices=ROUTER_REPLAYS,
    )
    freeze_router_bias: bool = key(True, "The routers' correction biases do not move.")
    upo_weight: float = key(
        0.0, "Weight of a preference loss on pairs of completions of one group, best and worst (UPO); 0: none.", ge=0
    )
    upo_beta: float = key(0.1, "UPO: how strongly the policy is kept near what it is compared with.", gt=0)
    upo_margin: float = key(0.0, "UPO: a pair's rewards differ by more than this.", ge=0)
    upo_reference: str = key(
        "ref",
        "UPO: what the policy is compared with: the reference, or the policy that made the completions (old).",
        choices=("ref", "old"),
    )
    upo_offline_weight: float = key(
        0.0, "UPO: weight of the same loss on pairs that were made in advance (upo_offline_path); 0: none.", ge=0
    )
    upo_offline_path: tuple[str, ...] = list_of(
        str, "UPO: files of preference data, as stage: DPO reads them.", path=True
    )
    upo_offline_type: tuple[str, ...] = list_of(
        str, "UPO: format of each entry of upo_offline_path; empty: erniekit.", choices=DATASET_TYPES
    )
    upo_offline_pairs: int = key(8, "UPO: pairs of upo_offline_path in each optimizer step, over all ranks.", ge=1)
    log_completions: bool = key(True, "Write every completion with its rewards to samples.jsonl.")
    num_completions_to_print: int = key(
        4, "Completions of a rollout that are logged, with prompt, rewards and advantage; 0: none.", ge=0
    )
    print_completions_steps: int = key(10, "Optimizer steps between two rollouts whose completions are logged.", ge=1)
