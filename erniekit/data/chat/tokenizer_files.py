"""Reads the JSON files of a tokenizer: added tokens, the tokens of roles, and the chat template."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, kind, read_json_object, read_text

# role -> its token in ERNIE 4.5, for directories that do not define it
ROLES = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
MAX_IDS = 2**24  # the largest vocabulary; published ones have some hundred thousand entries
LONGEST = 128  # characters of a special token
COPY = "Copy the tokenizer's files again, all from one model."
MARKUP = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Added:
    """A token that is recognised as a whole, before other text is split. `special`: whether decoding may skip it."""

    text: str
    id: int
    special: bool


class ChatTemplate(NamedTuple):
    """A model's own chat template: its jinja text, and the file (and key) that contains it."""

    source: str
    file: str


def declared_tokens(directory: Path, config: JsonObject) -> list[Added]:
    """The added tokens in the JSON files: {id: {content, special}} in tokenizer_config.json, and {content: id} in the
    older added_tokens.json.
    """
    older, newer = read_optional(directory / "added_tokens.json"), config.get_object("added_tokens_decoder")
    tokens: dict[int, Added] = {}
    for name in newer.values:
        if not re.fullmatch("[0-9]{1,9}", name):
            raise CheckpointError(f"{newer.where}: {name[:40]!r} is not an id. {COPY}")
        item = newer.get_object(name)
        text = item.get_text("content", None)
        if text is None:
            raise CheckpointError(f"{item.where}: it names no content. {COPY}")
        _declare(tokens, Added(text, int(name), item.get_bool("special", False)), newer.where)
    known = set(tokens)
    for text in older.values:
        i = older.get_int(text, None, 0, MAX_IDS - 1)
        if i is None:
            raise CheckpointError(f"{older.where}: {text!r} has no id. {COPY}")
        if i not in known or tokens[i].text != text:
            _declare(tokens, Added(text, i, bool(MARKUP.fullmatch(text))), older.where)
    texts = [item.text for item in tokens.values()]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise CheckpointError(f"{directory}: the added token {twice!r} has two ids. {COPY}")
    return sorted(tokens.values(), key=lambda item: item.id)


def _declare(tokens: dict[int, Added], item: Added, where: str) -> None:
    """Add an added token to `tokens`. Raises CheckpointError if it is not valid."""
    if item.id >= MAX_IDS:
        raise CheckpointError(f"{where}: the id {item.id} is too large; ids are below {MAX_IDS}. {COPY}")
    if not 0 < len(item.text) <= LONGEST:
        length = f"has {len(item.text):,} characters; at most {LONGEST}" if item.text else "is empty"
        raise CheckpointError(f"{where}: the token with id {item.id} {length}. {COPY}")
    if item.id in tokens:
        raise CheckpointError(f"{where}: {tokens[item.id].text!r} and {item.text!r} have the same id {item.id}. {COPY}")
    tokens[item.id] = item


def check_roles(file: JsonObject) -> None:
    """Raise CheckpointError for a role that is neither a token's text nor an object with its content."""
    for role in ROLES:
        named = file.values.get(role)
        text = named.get("content") if isinstance(named, dict) else named
        if not isinstance(text, str | None) or (isinstance(named, dict) and text is None):
            raise CheckpointError(
                f"{file.where}: {role}: must be a token's text, or an object with its content, found {kind(named)}. "
                f"{COPY}"
            )


def special_tokens(file: JsonObject) -> list[str]:
    """The tokens that a file lists as special besides those of roles. Entries that are not texts are left out."""
    listed: list[str] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        named = file.values.get(name)
        items = list(named.values()) if isinstance(named, dict) else named if isinstance(named, list) else []
        texts = [item.get("content") if isinstance(item, dict) else item for item in items]
        listed += [text for text in texts if isinstance(text, str)]
    return listed


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The chat template of a model or adapter directory: chat_template.jinja, else the key chat_template in
    tokenizer_config.json, else in chat_template.json (a processor's). Raises CheckpointError if it is not text.
    """
    path = directory / "chat_template.jinja"
    try:
        return ChatTemplate(read_text(path, CheckpointError), str(path))
    except FileNotFoundError:
        pass
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_optional(directory / name).values.get("chat_template")
        where = f"{directory / name}: chat_template"
        if isinstance(template, list):
            template = _default_template(template, where)
        if template is None:
            continue
        if not isinstance(template, str):
            raise CheckpointError(
                f"{where}: must be the text of a template, or a list of named ones, not {kind(template)}. "
                "Copy the file again from the model's source, or put the template into chat_template.jinja."
            )
        return ChatTemplate(template, where)
    return None


def _default_template(templates: list[Any], where: str) -> str | None:
    """The template named default, among several named ones."""
    named = {}
    for item in templates:
        name, source = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise CheckpointError(
                f'{where}: a list must have an object {{"name": ..., "template": ...}} for each template. '
                "Copy the file again from the model's source, or put one template into chat_template.jinja."
            )
        named[name] = source
    others = ", ".join(sorted(set(named) - {"default"}))
    if "default" not in named:
        log.once(f"{where}: none of the templates ({others}) is called default; not used")
    elif others:
        log.info(f"{where}: the template called default is used for all conversations; not used: {others}")
    return named.get("default")


def read_optional(path: Path) -> JsonObject:
    """The object in a JSON file; empty if the file does not exist."""
    try:
        return JsonObject(read_json_object(path, CheckpointError), str(path), CheckpointError)
    except FileNotFoundError:
        return JsonObject({}, str(path), CheckpointError)
