"""One message of a record, whose content may be a list of parts."""

from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, check_text_parts, has_content
from erniekit.data.records.sample import turn_of
from erniekit.data.vision.parts import content_parts, merged, text_in
from erniekit.data.vision.tags import MEDIA

_STAND_IN = "-"  # for the text of a message that has none beside its pictures


def read_turn(turn: Any, name: str, keys: tuple[str, str], notes: Notes) -> dict[str, Any]:
    """records.sample.turn_of for a message whose content may have media parts: its content is then a list of parts."""
    content = turn.get(keys[1]) if isinstance(turn, dict) else None
    for field in MEDIA:
        if isinstance(turn, dict) and has_content(turn.get(field)):
            raise BadRecord(
                f"{name} has the field {field!r} of its own",
                f"move it into the record's '{field.removesuffix('s')}s', and write tags into the content",
            )
    if not isinstance(content, list) or not any(_is_medium(part) for part in content):
        return turn_of(turn, name, keys, notes)
    check_text_parts(content, notes)
    parts = content_parts(content, f"{name}.{keys[1]}")
    checked = turn_of({**turn, keys[1]: text_in(parts).strip() or _STAND_IN}, name, keys, notes)
    if checked["role"] == "assistant":
        raise BadRecord(f"{name} is the assistant's and has pictures", "this model writes text only")
    return {**checked, "content": merged(parts)}


def _is_medium(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") != "text" and not ("type" not in part and "text" in part)
