"""The facts about each method that `stage` names: what data it reads, and which keys it does not read.

This is one half of the method table. It is pure data, since the layers `config` and `data` lie below all computation;
training/methods.py adds the recipe and evaluator of each method and describes how to add one. Code that depends on the
method tests a fact of its row (`cfg.method.records`), never its name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from erniekit.config.schema_curriculum import CurriculumArgs
from erniekit.config.schema_gkd import GkdArgs
from erniekit.config.schema_kto import KtoArgs
from erniekit.config.schema_mixture import MixtureArgs
from erniekit.config.schema_preference import PreferenceArgs
from erniekit.config.schema_reward_model import RewardModelArgs
from erniekit.config.schema_rewards import RewardArgs
from erniekit.config.schema_rl import RLArgs
from erniekit.config.schema_rollout_server import RolloutServerArgs
from erniekit.config.schema_rollout_tools import RolloutToolArgs
from erniekit.config.schema_vision import VisionArgs


class Records(Enum):
    """The kind of records that a method reads; the values are used in messages."""

    CONVERSATIONS = "conversations"
    PAIRS = "pairs of answers"
    TEXT = 'pretraining text ({"text": ...})'
    PROMPTS = "prompts"
    JUDGED = "judged answers"


@dataclass(frozen=True)
class MethodFacts:
    """What the configuration and the data pipeline need to know about a method.

    title: its description in the documentation of `stage`.
    records: the kind of its records. vision: whether records may contain pictures and videos.
    token_files: whether it also trains on token files (dataset_type: pretrain).
    divides_rows: whether context ranks may share the tokens of its rows.
    options: the groups of keys that only this method, and others with the same group, reads.
    also_reads: keys that it reads although their group belongs to other methods, or to commands that generate.
    unread: the keys of other groups that it does not read, with the reason.
    defaults: the values of keys that are not given when it trains, where they are not those of the schema.
    scores: whether its model gives a text one number instead of logits.
    metric: the metric of evaluations that metric_for_best_model stands for where it is not given.
    metrics: the names of all metrics that an evaluation during training can give; `*` stands for the rest of a name
        (evaluation_metrics.py says which of them one does give).
    later: the missing feature that it needs; empty if the method is built.
    """

    name: str
    title: str
    records: Records
    vision: bool = False
    token_files: bool = False
    divides_rows: bool = False
    options: tuple[type, ...] = ()
    also_reads: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    scores: bool = False
    metric: str = "loss"
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")
    later: str = ""

    def reads(self, key: str) -> bool:
        """Whether the method reads this key of the configuration."""
        if key in self.unread or (key in OPTIONS_OF_VISION and not self.vision):
            return False
        if key not in OPTIONS_OF_METHODS or key in self.also_reads:
            return True
        return any(key in option_names(group) for group in self.options)


def option_names(group: type) -> tuple[str, ...]:
    """The keys of a group of options."""
    return tuple(field.name for field in dataclasses.fields(group))


_UNREAD_BY_PREFERENCES = {
    "num_nextn_predict_layers": "preference losses have no term for tokens further ahead",
    "qat_distill_weight": "preference losses have no term for the predictions of another model",
    "token_balance_loss": "every pair weighs the same",
    "z_loss_lambda": "it belongs to the next-token loss",
}
_UNREAD_BY_DISTILLATION = {
    "num_nextn_predict_layers": "the teacher's predictions are of the next token alone",
    "qat_distill_weight": "the loss is a divergence from a teacher already",
    "token_balance_loss": "every token of an answer weighs the same",
    "z_loss_lambda": "it belongs to the next-token loss",
}
_UNREAD_BY_POLICIES = {
    "num_nextn_predict_layers": "policy losses have no term for tokens further ahead",
    "qat_distill_weight": "policy losses have no term for the predictions of another model",
    "token_balance_loss": "rl_loss_type says what is averaged",
    "z_loss_lambda": "it belongs to the next-token loss",
    "truncation": "a prompt that is longer than max_prompt_len is left out and counted",
    "gradient_accumulation_steps": "the microbatches of a step follow from its completions and batch_size",
    "batch_size_warmup_steps": "every step has the completions that rollout_batch_size and num_generations give",
    "max_estimate_samples": "the steps follow from the number of prompts",
} | {
    key: why
    for keys, why in (
        ("packing buffer_size greedy_intokens", "the completions of a microbatch are never padded"),
        ("mix_strategy train_dataset_prob num_samples_each_epoch", "every prompt is drawn once in an epoch"),
    )
    for key in keys.split()
}
_OF_SCORES = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
_OF_PAIRS = (*_OF_SCORES, "logp_chosen", "logp_rejected", "kl")
_OF_PICTURES = ("loss", "perplexity", "token_accuracy", "loss_text", "loss_image", "loss_video")
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "enable_thinking")
_RL = MethodFacts(
    "RL",
    "reinforcement learning",
    Records.PROMPTS,
    options=(RLArgs, RewardArgs, CurriculumArgs, RolloutToolArgs, RolloutServerArgs),
    also_reads=("max_prompt_len", *_SAMPLING),
    unread=_UNREAD_BY_POLICIES,
    metric="reward",
    metrics=("reward", "reward_*", "accuracy", "completion_length", "truncated"),
    defaults={
        "learning_rate": 1e-6,
        "batch_size": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "moe_aux_loss_lambda": 0.0,
    },
)
METHODS: dict[str, MethodFacts] = {
    facts.name: facts
    for facts in (
        MethodFacts("SFT", "fine-tuning", Records.CONVERSATIONS, divides_rows=True),
        MethodFacts(
            "PT",
            "pretraining",
            Records.TEXT,
            token_files=True,
            divides_rows=True,
            unread={"truncation": "a text that is longer than max_seq_len is split, and nothing of it is lost"},
        ),
        MethodFacts(
            "DPO",
            "pairs",
            Records.PAIRS,
            divides_rows=True,
            options=(PreferenceArgs,),
            unread=_UNREAD_BY_PREFERENCES,
            metrics=_OF_PAIRS,
        ),
        MethodFacts(
            "RM",
            "reward model",
            Records.PAIRS,
            divides_rows=True,
            options=(RewardModelArgs,),
            also_reads=("max_prompt_len",),
            scores=True,
            metrics=_OF_SCORES,
            unread=_UNREAD_BY_PREFERENCES
            | {"loss_subbatch_seqlen": "a score is one number, and no logits are computed"},
        ),
        MethodFacts(
            "VL-SFT", "with pictures", Records.CONVERSATIONS, vision=True, divides_rows=True, metrics=_OF_PICTURES
        ),
        MethodFacts("OCR-VL-SFT", "", Records.CONVERSATIONS, vision=True, later="PaddleOCR-VL"),
        MethodFacts("VL-PT", "with pictures", Records.TEXT, vision=True, divides_rows=True, metrics=_OF_PICTURES),
        MethodFacts(
            "VL-DPO",
            "with pictures",
            Records.PAIRS,
            vision=True,
            divides_rows=True,
            options=(PreferenceArgs,),
            metrics=_OF_PAIRS,
            unread=_UNREAD_BY_PREFERENCES
            | {"max_prompt_len": "a prompt with pictures is not shortened"}
            | dict.fromkeys(option_names(MixtureArgs), "pairs without pictures may stand in train_dataset_path"),
        ),
        MethodFacts(
            "KTO",
            "judged answers",
            Records.JUDGED,
            divides_rows=True,
            options=(KtoArgs,),
            metrics=("loss", "accuracy", "kl", "reward_good", "reward_bad", "margin"),
            also_reads=("beta",),
            unread=_UNREAD_BY_PREFERENCES | {"token_balance_loss": "every answer weighs the same"},
        ),
        MethodFacts(
            "GKD",
            "distillation",
            Records.CONVERSATIONS,
            options=(GkdArgs,),
            also_reads=("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"),
            unread=_UNREAD_BY_DISTILLATION,
            defaults={"max_new_tokens": 128, "temperature": 0.9, "top_p": 1.0},
        ),
        _RL,
        dataclasses.replace(
            _RL,
            name="VL-RL",
            title="with pictures",
            vision=True,
            unread=_UNREAD_BY_POLICIES
            | dict.fromkeys(option_names(MixtureArgs), "prompts without pictures may stand in train_dataset_path"),
        ),
    )
}
DEFAULT = next(iter(METHODS))
BUILT = [facts.name for facts in METHODS.values() if not facts.later]
OPTIONS_OF_METHODS = frozenset(
    name for facts in METHODS.values() for group in facts.options for name in option_names(group)
)
OPTIONS_OF_VISION = frozenset([*option_names(VisionArgs), *option_names(MixtureArgs)])


def stage_doc() -> str:
    """The documentation of the key `stage`."""
    built = [METHODS[name] for name in BUILT]
    texts = [f"{facts.name} ({facts.title})" for facts in built if not facts.vision]
    pictures = ", ".join(facts.name for facts in built if facts.vision)
    later = [name for name in METHODS if name not in BUILT]
    unbuilt = f"; not built yet: {', '.join(later)}" if later else ""
    return f"Method: {join_names(texts, 'or')}; with pictures {pictures}{unbuilt}."


def join_names(names: Sequence[str], word: str) -> str:
    """Names for a message: "A", "A or B", "A, B or C"; `word` stands before the last."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
