"""Decides which fields of a record are read, which are ignored, and which are refused.

A field that a format does not know is ignored and counted, since data sets carry ids, sources and scores. It is refused
if ignoring it would silently change what is trained: if its name is a misspelt name of a known field, or if other
formats and tools use it to decide what is trained. An empty field (null, "", [] or {}) is ignored whatever its name,
unless the name is misspelt.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.utils.wording import count_of


@dataclass
class Notes:
    """Notes on records for the report about their file: `unused` are the ignored fields ("'id'", "'timestamp' of a
    message"), `doubts` are sentences about content that was accepted although it is unusual.
    """

    unused: set[str] = field(default_factory=set)
    doubts: set[str] = field(default_factory=set)


def unused_line(unused: Counter[str], num_records: int) -> str:
    """The line about the ignored fields of records, which counts in how many of them each is."""
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{name} ({count})" for name, count in ranked[:_SHOWN_FIELDS])
    more = f" and {len(ranked) - _SHOWN_FIELDS} more" if len(ranked) > _SHOWN_FIELDS else ""
    return f"fields that are not used, and in how many of {count_of(num_records, 'record')}: {listing}{more}"


_SHOWN_FIELDS = 20  # the others are only counted
_MEDIA = (
    "pictures are read with stage: VL-SFT and a vision-language model, and not from text_dataset_path: set that stage, "
    "use train_dataset_path, or remove it"
)
_SOUND = "sound is not known: remove it, or the record"
_SAMPLE_WEIGHT = "weights of samples are not known: remove it, or set the shares of data sets (train_dataset_prob)"
_PAIRS = "this looks like preference data (stage DPO): set stage: DPO, with pictures VL-DPO, or remove it"
_ONE_ANSWER = "the answer is 'output' in type alpaca, or the last of the 'messages': rename it, or remove it"
# field by which some format or tool decides what is trained -> what the user should do about it
DECISIVE = {
    "system": "make it the first message, of role system, or remove it",
    "system_prompt": "call it 'system', or remove it",
    "history": "put the earlier turns where this type has them, or remove it",
    "tools": "use type messages or sharegpt, or remove it",
    "functions": "call it 'tools', or remove it",
    "label": "use type erniekit, messages or sharegpt, which have a 0 or 1 for each answer, or remove it",
    "is_system": "use type erniekit, or remove it",
    **dict.fromkeys(("response", "sort", "chosen", "rejected", "chosen_response", "rejected_response"), _PAIRS),
    "kto_tag": "judged answers are trained on with stage: KTO: set that stage, or remove it",
    **dict.fromkeys(("weight", "loss_weight", "sample_weight", "loss_mask"), _SAMPLE_WEIGHT),
    **dict.fromkeys(("image", "images", "video", "videos", "text_info", "image_info", "video_info"), _MEDIA),
    **dict.fromkeys(("audio", "audios"), _SOUND),
}
# the fields among them that our own formats have; their misspellings are refused in records of any type
_OURS = ("system", "history", "tools", "label", "is_system", "response", "sort", "chosen", "rejected")
_SHOWN_OR_NOT = "use the record's 'label', a 0 or 1 for each answer"
_THOUGHT = "call it 'reasoning_content', or remove it"
# the same for fields of a message
DECISIVE_IN_MESSAGES = {
    **dict.fromkeys(("weight", "loss", "loss_weight", "loss_mask", "train", "mask", "label"), _SHOWN_OR_NOT),
    **dict.fromkeys(("reasoning", "thinking", "thought"), _THOUGHT),
    "refusal": "write the refusal as the content, or remove the record",
    "function_call": 'write it as tool_calls: [{"function": {"name": ..., "arguments": ...}}]',
    **dict.fromkeys(("tools", "functions"), "move it out of the message, into the record's 'tools'"),
    **dict.fromkeys(("image", "images", "video", "videos"), _MEDIA),
    **dict.fromkeys(("audio", "audios"), _SOUND),
}
_PART_OF_ITS_OWN = "write it as a part of its own, or remove it"
# the same for fields of a text part
_DECISIVE_IN_TEXT_PARTS = {
    **dict.fromkeys(("weight", "loss", "loss_weight", "loss_mask", "train", "mask", "label"), _SHOWN_OR_NOT),
    **dict.fromkeys(("image", "image_url", "images", "video", "video_url", "videos"), _PART_OF_ITS_OWN),
    **dict.fromkeys(("audio", "audios", "input_audio"), _SOUND),
}


MESSAGE = "a message"


def has_content(value: Any) -> bool:
    """Whether a field has content: null, "", [] and {} are empty."""
    return not (value is None or value == "" or value == [] or value == {})


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of the known names, of which there must be at least one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def check_fields(
    values: Mapping[str, Any], known: tuple[str, ...], owner: str, decisive: Mapping[str, str], notes: Notes
) -> None:
    """Check the fields of a record or a message that are not `known`: raise BadRecord for a field that must not be
    ignored, and note every other one that has content. `owner` describes what has the fields: "type alpaca", "a
    message".
    """
    for name, value in values.items():
        if name in known:
            continue
        if name in decisive:
            if has_content(value):
                is_answer = name == "response" and isinstance(value, str)
                hint = _ONE_ANSWER if is_answer else decisive[name]
                raise BadRecord(f"field {name!r} does not belong to {owner}", hint)
        elif similar := misspelt(str(name), known + _OURS):
            raise BadRecord(
                f"unknown field {name!r} of {owner}; the nearest known one is {similar!r}",
                f"rename or remove it (known: {', '.join(known)})",
            )
        if has_content(value):
            notes.unused.add(repr(name) if owner.startswith("type ") else f"{name!r} of {owner}")


def check_text_parts(content: Any, notes: Notes) -> None:
    """`check_fields` for the text parts (OpenAI's form) of a message's content, if it is a list."""
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") == "text":
            check_fields(part, ("type", "text"), "a text part", _DECISIVE_IN_TEXT_PARTS, notes)


@lru_cache(maxsize=4096)
def misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """The known name that `name` probably means: one that differs in case and punctuation only, or by a typing mistake
    (two in names of ten letters). A name of several words must be similar as a whole: conversation_id is not a
    misspelling of conversations. A name of up to four letters is near to many words (src: sec; text: next; sort:
    short), so that only its plural and two letters that changed places count.
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]
    return next((close for close in known if _is_near(words, close.lower().replace("_", ""))), None)


def _is_near(words: Sequence[str], target: str) -> bool:
    plain = "".join(words)
    distance = _distance(plain, target) if abs(len(plain) - len(target)) <= 2 else 3
    if len(target) < 5:
        return distance == 0 or (distance == 1 and (plain == f"{target}s" or sorted(plain) == sorted(target)))
    if len(words) > 1:
        return distance <= (1 if len(target) >= 6 else 0)
    return distance <= (2 if min(len(plain), len(target)) >= 10 else 1)


def _distance(a: str, b: str) -> int:
    """The number of insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`."""
    rows = [list(range(len(b) + 1))]
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
