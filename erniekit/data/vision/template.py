"""Chat templates whose messages hold pictures and videos.

A message's content is text or a list of parts: {"type": "text", "text": ...}, {"type": "image", ...} and
{"type": "video", ...}. The template writes a start tag, one placeholder and an end tag for each picture or video;
`sequence.expand` then repeats the placeholder as often as the picture has tokens.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erniekit.data.chat.template import BUILT_IN, Messages, Segment, Template, Turn, load_template
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.chat.tokenizer_files import read_chat_template
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError
from erniekit.utils.wording import count_of

# What published templates write for a picture or a video, between its tags -> the token that stands there
PLACEHOLDERS = {
    "<|image@placeholder|>": "<|IMAGE_PLACEHOLDER|>",
    "<|video@placeholder|>": "<|VIDEO_PLACEHOLDER|>",
}
TAGS = {"image": ("<|IMAGE_START|>", "<|IMAGE_END|>"), "video": ("<|VIDEO_START|>", "<|VIDEO_END|>")}
_TYPED = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_SHOWN = re.compile(
    r"<\|(IMAGE|VIDEO)_START\|>(?:<\|(?:image|video)@placeholder\|>|<\|(?:IMAGE|VIDEO)_PLACEHOLDER\|>)<\|\1_END\|>"
)
_EMPTY_THOUGHT = re.compile(r"\s*</think>\s*")


class VisionTemplate(Template):
    """A chat template for conversations with pictures and videos. Made by load_vision_template.

    The input keeps <|end_of_sentence|> after each answer, whose label is eos. An empty thought is part of the prompt.
    Where generation begins after a closed thought (models that do not think), only the answers of the last round carry
    loss unless `label` says otherwise, as in ERNIE's training code; a round is a user's message and all that answers
    it.
    """

    ends_with_eos = False

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        super().__init__(name, source, tokenizer)
        for tag in (text for pair in TAGS.values() for text in pair):
            if tag not in tokenizer.special_tokens:
                raise ConfigError(
                    f"{tokenizer.directory}: the tokenizer has no token {tag}, so this is not a vision-language model. "
                    "Use a VL model for data with pictures."
                )
        self._written = dict(PLACEHOLDERS)
        if "<|VIDEO_PLACEHOLDER|>" not in tokenizer.special_tokens:  # as in ERNIE's training code
            self._written["<|video@placeholder|>"] = "<|IMAGE_PLACEHOLDER|>"
        prompt = self.render([{"role": "user", "content": "q"}], add_generation_prompt=True)
        self.closes_thought = prompt.rstrip().endswith("</think>")

    def __reduce__(self) -> tuple[Any, ...]:
        return VisionTemplate, (self.name, self.source, self.tokenizer)

    def encode_all(
        self, messages: Messages, tools: Sequence[Any] | None = None, label: Sequence[int] | None = None
    ) -> list[list[Segment]]:
        """See Template.encode_all; each picture or video is one placeholder between its tags."""
        if label is None and self.closes_thought:
            label = _last_round(messages)
        return super().encode_all(messages, tools, label)

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        return [_checked(message, number) for number, message in enumerate(messages, 1)]

    def _cut(self, text: str, keep: Sequence[str] = ()) -> list[str]:
        parts = []
        for part in super()._cut(text, keep):
            cuts = [match.start() + 1 for match in _TYPED.finditer(part)]
            parts += [part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)], strict=True)]
        return parts

    def _render(self, messages: Messages, tools: Any, add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        text = super()._render(messages, tools, add_generation_prompt, variables)
        given = [part["type"] for message in messages for part in _media(message)]
        shown = [match[1].lower() for match in _SHOWN.finditer(text)]
        if shown != given:
            raise DataError(
                f"chat template {self.name} shows {len(shown)} of "
                f"{count_of(len(given), 'picture or video', 'pictures and videos')}, or in another order. Choose "
                "another template (`chat_template: vl` or `vl_thinking`)."
            )
        return text

    def _sequences(self, messages: Messages, tools: Any, variables: dict[str, Any], strict: bool) -> list[list[Turn]]:
        sequences = super()._sequences(messages, tools, variables, strict)
        return [[_with_empty_thought_in_prompt(turn) for turn in turns] for turns in sequences]

    def _ids(self, text: str, mark: str) -> list[int]:
        for typed, token in self._written.items():
            text = text.replace(typed, token)
        return super()._ids(text, mark)


def load_vision_template(tokenizer: Tokenizer, name: str | None = None, beside: Path | None = None) -> VisionTemplate:
    """The chat template for conversations with pictures: the named one, or the model's own, or else the built-in one
    for its kind of model. See chat.template.load_template.
    """
    own = (read_chat_template(beside) if beside is not None else None) or tokenizer.chat_template
    if name is None and (own is None or own.source == (BUILT_IN / "text.jinja").read_text("utf-8")):
        name = "vl"
        log.info(
            f"{tokenizer.directory} has no chat template for pictures: {name} is used (set chat_template: vl_thinking "
            "for a model that thinks)"
        )
    template = load_template(tokenizer, name, beside)
    return VisionTemplate(template.name, template.source, tokenizer)


def _checked(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is text or a list of parts, of which media parts say nothing but their type: a template
    must not depend on a picture's name, and a data URI may have megabytes.
    """
    if not isinstance(message.get("role"), str):
        raise DataError(f"message {number} has no role: write system, user, assistant or tool")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": content or ""}
    if not isinstance(content, list):
        raise DataError(f"message {number}: content must be text or a list of parts, not {type(content).__name__}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in TAGS:
            parts.append({"type": kind, kind: "", f"{kind}_url": {"url": ""}})
        else:
            raise DataError(f"message {number} has a part that is neither text, image nor video: {str(part)[:80]}")
    if all(part["type"] == "text" for part in parts):
        return {**message, "content": "".join(part["text"] for part in parts)}
    if message["role"] == "assistant":
        raise DataError(f"message {number} is the assistant's and has pictures: this model writes text only")
    return {**message, "content": parts}


def _media(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else [part for part in content if part["type"] != "text"]


def _last_round(messages: Messages) -> list[int]:
    """A 1 for each answer after the last user message, a 0 for each earlier one."""
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    last = users[-1] if users else -1
    return [int(i > last) for i, message in enumerate(messages) if message.get("role") == "assistant"]


def _with_empty_thought_in_prompt(turn: Turn) -> Turn:
    if "<think>" not in turn.prompt:
        return turn
    match = _EMPTY_THOUGHT.match(turn.answer)
    if match is None or turn.prompt.rstrip().endswith("</think>"):
        return turn
    return turn._replace(prompt=turn.prompt + match[0], answer=turn.answer[match.end() :])
