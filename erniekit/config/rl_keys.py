"""What stage RL adds to the reading of a configuration: TRL's names (those of KTO, too), the values that rl_algorithm
stands for, and the rules over several of its keys.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from erniekit.config.compat import DATA
from erniekit.config.fields import coerce
from erniekit.config.methods import DEFAULT, METHODS, Records
from erniekit.config.pointless_rl import has_reference
from erniekit.config.read import Entry
from erniekit.config.schema import Config, fields
from erniekit.config.schema_curriculum import CurriculumArgs, curriculum_problems
from erniekit.config.schema_rewards import reward_names
from erniekit.config.schema_rl import PRESETS
from erniekit.config.schema_rollout_server import server_problems
from erniekit.config.schema_rollout_tools import tool_problems
from erniekit.config.schema_use import LEAST_LEARNED_TEMPERATURE
from erniekit.config.values import plain
from erniekit.utils.wording import count_of

# Names of TRL's GRPOConfig and KTOConfig for keys that have another name here, because theirs belongs to another method
# or is new.
TRL_NAMES = {
    Records.PROMPTS: {
        "beta": "kl_coef",
        "loss_type": "rl_loss_type",
        "max_prompt_length": "max_prompt_len",
        "use_bias_correction_kl": "kl_bias_correction",
    },
    Records.JUDGED: {"loss_type": "kto_loss_type"},
}
_WIDE_FOR_SEQUENCES = 0.05  # a clip range that the mean of a completion's log-ratios hardly ever leaves


def translate(layers: Sequence[Sequence[Entry]]) -> tuple[list[list[Entry]], list[str]]:
    """(the entries with TRL's names replaced where the method has some, a note for each).

    A name is left alone in a layer that also has the key that it would stand for, such as a saved config.yaml, unless
    it can only be TRL's there: no key here has this name, or not this value.
    """
    names = {entry.name: plain(entry.value) for entries in layers for entry in entries}
    stage = next((name for name in METHODS if name.lower() == str(names.get("stage", "")).lower()), "")
    renamed = TRL_NAMES.get(METHODS[stage].records, {}) if stage else {}
    if not renamed:
        return [list(entries) for entries in layers], []
    notes: list[str] = []
    translated = []
    for entries in layers:
        given = {entry.name for entry in entries}
        result = []
        for entry in entries:
            to = renamed.get(entry.name)
            if to is None or entry.value is None or (to in given and _is_own(entry)):
                result.append(entry)
                continue
            result.append(dataclasses.replace(entry, name=to, place=f"{entry.place}, written {entry.name}"))
            notes.append(f"{entry.name}: read as {to}, as stage: {stage} means TRL's name ({entry.place})")
        translated.append(result)
    return translated, notes


def _is_own(entry: Entry) -> bool:
    """Whether an entry under one of TRL's names is also a possible value of the key that has this name here."""
    own = fields().get(entry.name)
    if own is None:
        return False
    try:
        coerce(own, entry.value)
    except ValueError:
        return False
    return True


def generates(cfg: Config) -> bool:
    """Whether the method answers prompts with the trained model while it trains."""
    return cfg.method.records is Records.PROMPTS or (cfg.method.reads("lmbda") and cfg.lmbda > 0)


def no_generation(cfg: Config) -> str:
    """The problem of a method that generates in a precision in which a CPU cannot."""
    instead = "; rollout_dtype: bf16 rounds the weights that generate" if cfg.method.reads("rollout_dtype") else ""
    return (
        f"emulate_precision: True: a CPU cannot generate with {cfg.compute_type} weights, as stage: {cfg.method.name} "
        f"does. Leave it out{instead}"
    )


def complete(values: dict[str, Any], command: str, notes: list[str]) -> None:
    """Fill in the values that the method has by itself, and those that rl_algorithm stands for, when it trains, and the
    length of completions, also when it is evaluated.
    """
    facts = METHODS[values.get("stage", DEFAULT)]
    learns_from_rewards = facts.records is Records.PROMPTS
    if command == "train":
        preset = PRESETS[values.get("rl_algorithm", "gspo")] if learns_from_rewards else {}
        for name, value in (*facts.defaults.items(), *preset.items()):
            values.setdefault(name, value)
    if not learns_from_rewards or command not in DATA or values.get("eval_benchmark"):
        return
    if "max_completion_length" not in values and "max_new_tokens" in values:
        values["max_completion_length"] = values["max_new_tokens"]
        notes.append(f"max_completion_length: not given, so {values['max_new_tokens']}, because max_new_tokens is")


def problems(cfg: Config) -> Iterator[str]:
    """The problems of a configuration that learns from rewards, each as "key: what is wrong, and what to do"."""
    if cfg.method.records is not Records.PROMPTS:
        return
    yield from _numbers(cfg)
    yield from _loss(cfg)
    yield from _reference(cfg)
    yield from server_problems(cfg)
    yield from tool_problems(cfg, cfg.method.vision, cfg.num_iterations * cfg.steps_per_generation)
    names = reward_names(cfg.reward_funcs)
    if cfg.difficulty_metric not in (*names, CurriculumArgs.difficulty_metric):
        yield (
            f"difficulty_metric: {cfg.difficulty_metric}: none of reward_funcs has this name. Choose from "
            f"{', '.join(names)}, or leave it out"
        )
    yield from curriculum_problems(
        cfg, len(cfg.train_dataset_path), cfg.num_iterations * cfg.steps_per_generation, cfg.max_steps
    )


def _temperature(cfg: Config) -> Iterator[str]:
    if cfg.temperature == 0:
        yield "temperature: 0 gives the same completion every time, and nothing to compare. Use 1.0"
    elif cfg.temperature < LEAST_LEARNED_TEMPERATURE:
        yield (
            f"temperature: {cfg.temperature:g} is below {LEAST_LEARNED_TEMPERATURE:g}: it divides the logits, which "
            "then leave fp32, and completions hardly differ. Use 1.0"
        )


def _numbers(cfg: Config) -> Iterator[str]:
    yield from _temperature(cfg)
    if cfg.rollout_batch_size % cfg.steps_per_generation:
        working = [n for n in range(1, cfg.rollout_batch_size + 1) if cfg.rollout_batch_size % n == 0]
        yield (
            f"steps_per_generation: {cfg.steps_per_generation} does not divide rollout_batch_size: "
            f"{cfg.rollout_batch_size} prompts. Each step takes whole groups of {cfg.num_generations} completions: use "
            f"one of {', '.join(map(str, working))}, or rollout_batch_size: "
            f"{-(-cfg.rollout_batch_size // cfg.steps_per_generation) * cfg.steps_per_generation}"
        )
    if cfg.upo_weight and cfg.batch_size % cfg.num_generations:
        yield (
            f"batch_size: {cfg.batch_size}: upo_weight compares the completions of a group, so a microbatch has to "
            "hold whole groups: use a multiple of num_generations, such as "
            f"{max(cfg.batch_size // cfg.num_generations, 1) * cfg.num_generations}"
        )
    yield from _offline_pairs(cfg)
    if cfg.max_completion_length >= cfg.max_seq_len:
        yield (
            f"max_completion_length: {cfg.max_completion_length} leaves no room for a prompt in max_seq_len: "
            f"{cfg.max_seq_len}. Lower it, or raise max_seq_len"
        )
    if cfg.soft_max_length is not None and cfg.soft_max_length > cfg.max_completion_length:
        yield (
            f"soft_max_length: {cfg.soft_max_length} is more than max_completion_length: {cfg.max_completion_length}, "
            "so no completion would reach it"
        )
    if cfg.soft_cache_length is not None and cfg.soft_max_length is None:
        yield "soft_max_length: needed with soft_cache_length; the length from which on the penalty is -1"
    elif cfg.soft_cache_length is not None and cfg.soft_cache_length > (cfg.soft_max_length or 0):
        yield f"soft_cache_length: {cfg.soft_cache_length} is more than soft_max_length: {cfg.soft_max_length}"


def _offline_pairs(cfg: Config) -> Iterator[str]:
    if not cfg.upo_offline_weight:
        return
    if not cfg.upo_offline_path:
        yield "upo_offline_path: needed with upo_offline_weight; a file of preference data"
    elif cfg.upo_offline_type and len(cfg.upo_offline_type) != len(cfg.upo_offline_path):
        yield (
            f"upo_offline_type: {count_of(len(cfg.upo_offline_type), 'format')} for "
            f"{count_of(len(cfg.upo_offline_path), 'entry', 'entries')} of "
            "upo_offline_path; give one for each"
        )
    if cfg.batch_size % 2:
        yield (
            f"batch_size: {cfg.batch_size}: upo_offline_weight puts both answers of a pair into one microbatch: use an "
            "even number"
        )
    if cfg.method.vision:
        yield "upo_offline_weight: pairs with stage: VL-RL are not built. Leave it out, or set stage: RL"


def _loss(cfg: Config) -> Iterator[str]:
    if cfg.delta is not None and cfg.rl_loss_type != "cispo" and cfg.delta <= 1 + cfg.epsilon_high:
        yield f"delta: {cfg.delta:g} must be more than 1 + epsilon_high ({1 + cfg.epsilon_high:g})"
    if cfg.icepop_alpha > 1 or cfg.icepop_beta < 1 or cfg.icepop_alpha >= cfg.icepop_beta:
        yield (
            f"icepop_alpha: {cfg.icepop_alpha:g} and icepop_beta: {cfg.icepop_beta:g}: the range has to hold 1, the "
            "weight of a token that both computations agree on"
        )


def _reference(cfg: Config) -> Iterator[str]:
    if cfg.sync_ref_model and not has_reference(cfg):
        yield "sync_ref_model: there is no reference: set kl_coef, or upo_weight with upo_reference: ref"
    if cfg.sync_ref_model and cfg.fine_tuning == "LoRA":
        yield "sync_ref_model: with fine_tuning: LoRA the reference is the model without its adapter. Leave it out"
    if cfg.kl_in_reward and cfg.kl_coef == 0:
        yield "kl_coef: needed with kl_in_reward: True; its weight in the reward"


def warnings(cfg: Config) -> list[str]:
    """What is allowed and rarely meant, one line each."""
    if cfg.method.records is not Records.PROMPTS:
        return []
    lines = []
    level = cfg.importance_sampling_level or ("sequence" if cfg.rl_loss_type.startswith("gspo") else "token")
    if level.startswith("sequence") and cfg.epsilon >= _WIDE_FOR_SEQUENCES:
        lines.append(
            f"epsilon: {cfg.epsilon:g} clips next to nothing with ratios of whole completions, which are geometric "
            "means over tokens; GSPO's paper has 3e-4 and 4e-4"
        )
    filters = [
        f"{name}: {vars(cfg)[name]:g}"
        for name, off in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0))
        if vars(cfg)[name] != off
    ]
    if filters:
        lines.append(
            f"{', '.join(filters)}: completions are drawn from a filtered distribution, and the loss knows the whole "
            "one: the ratios are biased"
        )
    if cfg.attention_probs_dropout_prob:
        lines.append(
            "attention_probs_dropout_prob: with dropout the policy that is trained is not the one that made the "
            "completions; set it to 0"
        )
    return lines
