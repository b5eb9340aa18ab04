"""The methods that `stage` names, as facts: what each one reads, and which keys it leaves unread.

This is one half of the table of methods. It is pure data, because configuration and data lie below everything that
computes; training/methods.py adds to each row what computes, and says how a method is added. A question about a method
is a question about a fact of its row (`cfg.method.records`), never about its name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from erniekit.config.schema_preference import PreferenceArgs
from erniekit.config.schema_vision import VisionArgs


class Records(Enum):
    """What the records of a method's data are, in the words of messages."""

    CONVERSATIONS = "conversations"
    PAIRS = "pairs of answers"
    TEXT = 'pretraining text ({"text": ...})'


_VISION = "vision-language models"


@dataclass(frozen=True)
class MethodFacts:
    """What the configuration and the data pipeline have to know of a method.

    title: what it is, in the documentation of `stage`.
    records: what its data are made of. vision: the records may hold pictures and videos.
    token_files: it also trains on token files (dataset_type: pretrain).
    options: the group of keys that only such methods read.
    unread: the keys of other groups that it leaves unread, and why.
    later: the feature without which it cannot be run; empty where it can be.
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
        """Whether the method reads a key of the configuration at all."""
        if key in self.unread or (key in OPTIONS_OF_VISION and not self.vision):
            return False
        return key not in OPTIONS_OF_METHODS or (self.options is not None and key in option_names(self.options))


def option_names(group: type) -> tuple[str, ...]:
    """The keys of a group of options."""
    return tuple(field.name for field in dataclasses.fields(group))


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
            unread={
                "num_nextn_predict_layers": "preference losses have no term for tokens further ahead",
                "token_balance_loss": "every pair weighs the same",
                "z_loss_lambda": "it belongs to the next-token loss",
            },
        ),
        MethodFacts("VL-SFT", "fine-tuning on conversations with pictures", Records.CONVERSATIONS, vision=True),
        MethodFacts("VL-PT", "", Records.TEXT, vision=True, later=_VISION),
        MethodFacts("OCR-VL-SFT", "", Records.CONVERSATIONS, vision=True, later="PaddleOCR-VL"),
        MethodFacts("VL-DPO", "", Records.PAIRS, vision=True, options=PreferenceArgs, later=_VISION),
    )
}
DEFAULT = next(iter(METHODS))
BUILT = [facts.name for facts in METHODS.values() if not facts.later]
OPTIONS_OF_METHODS = frozenset(
    name for facts in METHODS.values() if facts.options is not None for name in option_names(facts.options)
)


OPTIONS_OF_VISION = frozenset(option_names(VisionArgs))


def stage_doc() -> str:
    """The documentation of the key `stage`."""
    built = [f"{name} ({METHODS[name].title})" for name in BUILT]
    later = [name for name in METHODS if name not in BUILT]
    unbuilt = f"; {', '.join(later[:-1])} and {later[-1]} are known but not built yet" if later else ""
    return f"The method: {', '.join(built[:-1])} or {built[-1]}{unbuilt}."
