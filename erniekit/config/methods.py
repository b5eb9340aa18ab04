"""The facts about each method that `stage` names: what data it reads, and which keys it does not read.

This is one half of the method table. It is pure data, since the layers `config` and `data` lie below all computation;
training/methods.py adds the recipe and evaluator of each method and describes how to add one. Code that depends on the
method tests a fact of its row (`cfg.method.records`), never its name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from erniekit.config.schema_mixture import MixtureArgs
from erniekit.config.schema_preference import PreferenceArgs
from erniekit.config.schema_vision import VisionArgs


class Records(Enum):
    """The kind of records that a method reads; the values are used in messages."""

    CONVERSATIONS = "conversations"
    PAIRS = "pairs of answers"
    TEXT = 'pretraining text ({"text": ...})'
    PROMPTS = "prompts"


@dataclass(frozen=True)
class MethodFacts:
    """What the configuration and the data pipeline need to know about a method.

    title: its description in the documentation of `stage`.
    records: the kind of its records. vision: whether records may contain pictures and videos.
    token_files: whether it also trains on token files (dataset_type: pretrain).
    options: the group of keys that only this method, and others with the same group, reads.
    unread: the keys of other groups that it does not read, with the reason.
    later: the missing feature that it needs; empty if the method is built.
    """

    name: str
    title: str
    records: Records
    vision: bool = False
    token_files: bool = False
    options: type | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    later: str = ""

    def reads(self, key: str) -> bool:
        """Whether the method reads this key of the configuration."""
        if key in self.unread or (key in OPTIONS_OF_VISION and not self.vision):
            return False
        return key not in OPTIONS_OF_METHODS or (self.options is not None and key in option_names(self.options))


def option_names(group: type) -> tuple[str, ...]:
    """The keys of a group of options."""
    return tuple(field.name for field in dataclasses.fields(group))


_UNREAD_BY_PREFERENCES = {
    "num_nextn_predict_layers": "preference losses have no term for tokens further ahead",
    "qat_distill_weight": "preference losses have no term for the predictions of another model",
    "token_balance_loss": "every pair weighs the same",
    "z_loss_lambda": "it belongs to the next-token loss",
}
METHODS: dict[str, MethodFacts] = {
    facts.name: facts
    for facts in (
        MethodFacts("SFT", "fine-tuning", Records.CONVERSATIONS),
        MethodFacts(
            "PT",
            "pretraining; ernie_pretrain is another word for it",
            Records.TEXT,
            token_files=True,
            unread={"truncation": "a text that is longer than max_seq_len is split, and nothing of it is lost"},
        ),
        MethodFacts(
            "DPO",
            "pairs of answers",
            Records.PAIRS,
            options=PreferenceArgs,
            unread=_UNREAD_BY_PREFERENCES,
        ),
        MethodFacts("VL-SFT", "with pictures", Records.CONVERSATIONS, vision=True),
        MethodFacts("OCR-VL-SFT", "", Records.CONVERSATIONS, vision=True, later="PaddleOCR-VL"),
        MethodFacts("VL-PT", "with pictures", Records.TEXT, vision=True),
        MethodFacts(
            "VL-DPO",
            "with pictures",
            Records.PAIRS,
            vision=True,
            options=PreferenceArgs,
            unread=_UNREAD_BY_PREFERENCES
            | {"max_prompt_len": "a prompt with pictures is not shortened"}
            | dict.fromkeys(option_names(MixtureArgs), "pairs without pictures may stand in train_dataset_path"),
        ),
    )
}
DEFAULT = next(iter(METHODS))
BUILT = [facts.name for facts in METHODS.values() if not facts.later]
OPTIONS_OF_METHODS = frozenset(
    name for facts in METHODS.values() if facts.options is not None for name in option_names(facts.options)
)
OPTIONS_OF_VISION = frozenset([*option_names(VisionArgs), *option_names(MixtureArgs)])


def stage_doc() -> str:
    """The documentation of the key `stage`."""
    built = [f"{name} ({METHODS[name].title})" for name in BUILT]
    later = [name for name in METHODS if name not in BUILT]
    verb = "is" if len(later) == 1 else "are"
    unbuilt = f"; {join_names(later, 'and')} {verb} known but not built yet" if later else ""
    return f"The method: {join_names(built, 'or')}{unbuilt}."


def join_names(names: Sequence[str], word: str) -> str:
    """Names for a message: "A", "A or B", "A, B or C"; `word` stands before the last."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
