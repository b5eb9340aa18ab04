"""Tools in the loop: after a turn of the model that calls tools, their results, and the next turn's beginning.

What the model has sampled is never tokenised again: the next prompt is the ids so far and the ids of what the chat
template writes behind them, the results and the generation prompt. That text depends on the results alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.prompts import Prompt
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import MediaPlan, plan_media
from erniekit.generation.thinking import ids_open_thought, split_thought
from erniekit.generation.tool_calls import read_calls
from erniekit.tools.result import ToolResult, failure
from erniekit.tools.toolbox import Toolbox
from erniekit.utils.errors import ConfigError, UserError

_CHARACTERS = 64  # of a token; hardly any has more
_UNREADABLE = 'the call cannot be read; write valid JSON: <tool_call>{"name": ..., "arguments": {...}}</tool_call>'


@dataclass
class Dialogue:
    """A completion under way: the messages so far, in the form of templates, of which the first `num_given` are the
    prompt's; the turns that the model has had; whether its next turn begins inside a thought.
    """

    messages: list[dict[str, Any]]
    num_given: int
    opened_thought: bool
    num_turns: int = 0
    num_calls: int = 0

    @property
    def turns(self) -> tuple[dict[str, Any], ...]:
        """The completion as messages."""
        return tuple(self.messages[self.num_given :])


@dataclass(frozen=True)
class Continuation:
    """What stands between two turns: `ids`, in which every picture has one placeholder, and how the pictures among the
    results are decoded. `end_input`: the id that the model reads in place of the end token that it sampled.
    """

    ids: list[int]
    end_input: int
    plans: list[MediaPlan] = field(default_factory=list)


class ToolLoop:
    """The tools of a run, and how their results are shown. Close it at the end.

    Raises ConfigError for a tool that cannot be set up, and for a chat template that does not show calls and results or
    that rewrites earlier turns when one follows.
    """

    def __init__(self, cfg: Config, template: Template, vision: VisionSpec | None = None) -> None:
        self._cfg, self._template, self._vision = cfg, template, vision
        for part in ("tools", "tool_calls", "results of tools"):
            if not template.shows(part):
                raise ConfigError(
                    f"tools: chat template {template.name} does not show {part}. Choose one that does, such as "
                    "chat_template: text, or leave tools out."
                )
        self._toolbox = Toolbox(cfg, Path.cwd(), vision)
        self._stand_in: dict[str, Any] = {"role": "assistant", "content": ""}
        try:
            self._choose_stand_in()
        except BaseException:
            self.close()
            raise

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The tools as templates show them."""
        return self._toolbox.descriptions

    def close(self) -> None:
        """End the process of the user's tools."""
        self._toolbox.close()

    def begin(self, prompt: Prompt) -> Dialogue:
        """The dialogue of a new completion of a prompt."""
        directory = Path(prompt.place.rpartition(":")[0] or prompt.place).parent
        messages = [_with_absolute_paths(message, directory) for message in prompt.messages]
        return Dialogue(messages, len(messages), self._opens_thought(prompt.ids))

    def after_turn(self, dialogue: Dialogue, ids: Sequence[int], has_ended: bool) -> Continuation | None:
        """Add a turn of the model, its ids without the end token, to the dialogue, and the results of its calls. None:
        the completion is over, because nothing was called, the turn was cut off, or it was the last one that max_turns
        allows.
        """
        cfg, tokenizer = self._cfg, self._template.tokenizer
        text = tokenizer.decode(list(ids))
        parsed = read_calls(split_thought(text, dialogue.opened_thought)[1])
        dialogue.num_turns += 1
        is_last = dialogue.num_turns >= cfg.max_turns or not has_ended
        if is_last or not (parsed.calls or parsed.unreadable):
            dialogue.messages.append({"role": "assistant", "content": text})
            return None
        calls = [{"type": "function", "function": call} for call in parsed.calls]
        said = text if not calls else read_calls(text).text
        dialogue.messages.append({"role": "assistant", "content": said} | ({"tool_calls": calls} if calls else {}))
        before = list(dialogue.messages)
        content: Any
        for number, call in enumerate(parsed.calls):
            if number < cfg.max_tool_calls:
                content = self._cut(self._toolbox.run(call, dialogue.messages))
                dialogue.num_calls += 1
            else:
                content = failure(f"only {cfg.max_tool_calls} calls a turn are executed (max_tool_calls)").content
            dialogue.messages.append({"role": "tool", "name": call["name"], "content": content})
        if not calls:
            dialogue.messages.append({"role": "tool", "content": failure(_UNREADABLE).content})
        results = dialogue.messages[len(before) :]
        names = [call["name"] for call in parsed.calls] or ["unreadable"]
        given, completion = before[: dialogue.num_given], before[dialogue.num_given : -1]
        shown = [self._calling([]) if turn["role"] == "assistant" else turn for turn in completion]
        continuation = self._between([*given, *shown, self._calling(names)], results)
        dialogue.opened_thought = self._opens_thought(continuation.ids)
        return continuation

    def _choose_stand_in(self) -> None:
        """Choose the message that stands for what was sampled: with a thought where the prompt opens one."""
        question, result = {"role": "user", "content": "q"}, {"role": "tool", "content": "r"}
        try:
            self._between([question, self._calling(["f"])], [result])
        except ConfigError:
            self._stand_in = {"role": "assistant", "content": "", "reasoning_content": "t"}
            self._between([question, self._calling(["f"])], [result])

    def _calling(self, names: Sequence[str]) -> dict[str, Any]:
        """A message of the assistant that calls tools. Its text does not matter: only what follows it is used."""
        calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names or ["f"]]
        return self._stand_in | {"tool_calls": calls}

    def _between(self, before: list[dict[str, Any]], results: list[dict[str, Any]]) -> Continuation:
        """What the template writes behind the assistant's message at the end of `before`: the results and the
        generation prompt.
        """
        try:
            ids, end = self._template.ids_between(before, results)
        except UserError as error:
            raise ConfigError(f"tools: {error}") from None
        plans: list[MediaPlan] = []
        if self._vision is not None:
            reader = MediaReader(Path.cwd())
            plans = plan_media(list(media_of(results)), reader, self._vision.settings, self._vision.video)
        return Continuation(ids, end, plans)

    def _opens_thought(self, ids: Sequence[int]) -> bool:
        return ids_open_thought(ids, self._template.tokenizer.decode)

    def _cut(self, result: ToolResult) -> str | list[dict[str, Any]]:
        """The content of a result, with at most max_tool_tokens tokens of text."""
        if not isinstance(result.content, str):
            return result.content
        # Python's text may hold halves of surrogate pairs, such as names of files that are not in UTF-8; ids cannot.
        text = result.content.encode("utf-8", "backslashreplace").decode()
        tokenizer, limit = self._template.tokenizer, self._cfg.max_tool_tokens
        beginning = text[: limit * _CHARACTERS]  # to encode all of a long text would take seconds
        ids = tokenizer.encode_plain(beginning)
        if len(ids) <= limit and len(beginning) < len(text):
            ids = tokenizer.encode_plain(text)
        return text if len(ids) <= limit else tokenizer.decode(ids[:limit]) + " ... (cut)"


def _with_absolute_paths(message: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A message whose images have paths that do not depend on the record's directory."""
    if not isinstance(message["content"], list):
        return message
    parts = []
    for part in message["content"]:
        source = part.get("image")
        if isinstance(source, str) and (directory / source).is_file():
            part = {**part, "image": str((directory / source).resolve())}
        parts.append(part)
    return {**message, "content": parts}
