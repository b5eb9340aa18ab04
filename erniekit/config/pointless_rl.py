"""Keys of reinforcement learning that another key makes pointless (see config/pointless.py)."""

from collections.abc import Callable

from erniekit.config.methods import Records
from erniekit.config.pointless_rule import Facts, Rule
from erniekit.config.schema import Config
from erniekit.config.schema_rollout_tools import DOCUMENTS


def _rl(when: Callable[[Config], bool]) -> Callable[[Config, Facts], bool]:
    """A condition of a method that learns from rewards."""
    return lambda cfg, facts: cfg.method.records is Records.PROMPTS and when(cfg)


def has_reference(cfg: Config) -> bool:
    """Whether the policy is compared with a reference model."""
    return cfg.kl_coef > 0 or (has_pairs(cfg) and cfg.upo_reference == "ref")


def wants_old_log_probs(cfg: Config) -> bool:
    """Whether the log-probabilities of the policy before its first update on a rollout are computed."""
    return (
        cfg.steps_per_generation * cfg.num_iterations > 1
        or cfg.rollout_base_url is not None
        or cfg.kl_in_reward
        or (cfg.upo_weight > 0 and cfg.upo_reference == "old")
    )


def has_pairs(cfg: Config) -> bool:
    """Whether the loss has a preference term."""
    return cfg.upo_weight > 0 or cfg.upo_offline_weight > 0


RL_RULES = [
    Rule(
        "max_new_tokens top_p top_k repetition_penalty",
        lambda c, f: c.method.reads("lmbda") and c.lmbda == 0,
        "lmbda is 0, so all answers are those of the data",
    ),
    Rule("kl_estimator kl_in_reward kl_bias_correction", _rl(lambda c: c.kl_coef == 0), "kl_coef is 0"),
    Rule("kl_bias_correction", _rl(lambda c: c.kl_in_reward), "the divergence is subtracted from the reward"),
    Rule(
        "ref_model_sync_steps ref_model_mixup_alpha",
        _rl(lambda c: not c.sync_ref_model),
        "sync_ref_model is False",
    ),
    Rule("epsilon delta", _rl(lambda c: c.rl_loss_type == "cispo"), "rl_loss_type: cispo has epsilon_high alone"),
    Rule(
        "icepop_alpha icepop_beta",
        _rl(lambda c: c.rollout_correction not in ("icepop", "icepop_sequence", "misc")),
        "rollout_correction is {rollout_correction}",
    ),
    Rule("tis_cap", _rl(lambda c: c.rollout_correction != "tis"), "rollout_correction is {rollout_correction}"),
    Rule("mis_cap", _rl(lambda c: c.rollout_correction != "mis"), "rollout_correction is {rollout_correction}"),
    Rule(
        "importance_sampling_level",
        _rl(lambda c: c.rollout_correction == "misc"),
        "rollout_correction: misc has the level sequence_token",
    ),
    Rule("upo_margin", _rl(lambda c: c.upo_weight == 0), "upo_weight is 0"),
    Rule("upo_beta upo_reference", _rl(lambda c: not has_pairs(c)), "upo_weight and upo_offline_weight are 0"),
    Rule(
        "upo_offline_path upo_offline_type upo_offline_pairs",
        _rl(lambda c: c.upo_offline_weight == 0),
        "upo_offline_weight is 0",
    ),
    Rule(
        "print_completions_steps",
        _rl(lambda c: c.num_completions_to_print == 0),
        "num_completions_to_print is 0",
    ),
    Rule(
        "max_resample_times difficulty_low difficulty_high difficulty_pause",
        _rl(lambda c: not c.dynamic_sample),
        "dynamic_sample is False",
    ),
    Rule(
        "rollout_model rollout_update_command rollout_timeout rollout_max_retries rollout_tolerance",
        _rl(lambda c: c.rollout_base_url is None),
        "rollout_base_url is not given",
    ),
    Rule("max_turns max_tool_calls max_tool_tokens", _rl(lambda c: not c.tools), "tools is empty"),
    Rule(
        "tool_timeout",
        _rl(lambda c: not any(".py:" in name for name in c.tools)),
        "tools has no function of your own",
    ),
    Rule(
        "document_search_path",
        _rl(lambda c: DOCUMENTS not in c.tools),
        "tools does not have document_search",
    ),
    Rule(
        "difficulty_momentum difficulty_floor",
        _rl(lambda c: c.difficulty_weighting == "none"),
        "difficulty_weighting is none",
    ),
    Rule("freeze_router_bias", lambda c, f: f.num_experts == 0, "the model has no experts"),
    Rule(
        "moe_use_aux_free moe_use_aux_free_update_coef",
        _rl(lambda c: c.freeze_router_bias),
        "freeze_router_bias is True",
    ),
]
