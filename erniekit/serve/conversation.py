"""A conversation with a model: what was said, the pictures in it, and the tools that the model calls."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erniekit.config import Config
from erniekit.data.chat.tokenizer import StreamDecoder
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.generation.load import ChatModel, sampling_of
from erniekit.generation.session import Session
from erniekit.generation.thinking import ThoughtParser, ids_open_thought
from erniekit.generation.tool_calls import CallFilter, format_call, read_calls
from erniekit.serve.typed_media import Medium, content_of, open_medium
from erniekit.tools.image_tools import ImageTools
from erniekit.tools.result import failure
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError, UserError

# A thought, an answer, or a remark about what happens, which is not part of the conversation.
Piece = tuple[Literal["thought", "answer", "note"], str]


@dataclass
class _Reply:
    """What the model has said in one go; `answer` has its calls, too."""

    thought: str = ""
    answer: str = ""


class Conversation:
    """What was said, and the model that answers.

    Messages have the form that templates take: content is text or parts, pictures are parts with pixels. Where the
    model sees pictures, thoughts are kept as `reasoning_content` if its template shows them, as a training row has
    them; models of text alone forget them.
    """

    def __init__(self, cfg: Config, chat_model: ChatModel) -> None:
        """Raises ConfigError for tools that the model cannot use."""
        self._cfg, self._chat_model = cfg, chat_model
        self._limits, self._sampling = chat_model.limits(cfg), sampling_of(cfg)
        self._tools = _tools(cfg, chat_model)
        self._keeps_thoughts = chat_model.vision is not None and chat_model.template.shows("reasoning_content")
        self.session = Session(chat_model.model)
        self.clear()

    @property
    def sees_pictures(self) -> bool:
        """Whether the model is one that pictures may be shown to."""
        return self._chat_model.vision is not None

    @property
    def has_tools(self) -> bool:
        """Whether calls of the model are executed."""
        return self._tools is not None

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The descriptions of the tools that the model may call."""
        return None if self._tools is None else self._tools.descriptions

    def clear(self) -> None:
        """Forget the conversation. With a seed the next one draws as this one did."""
        self.messages: list[dict[str, Any]] = []
        self.session.clear()
        self._waiting: list[Medium] = []
        self._turn = 0

    def add(self, kind: str, path: str) -> str:
        """Put a picture or video ("image", "video") before the next question; returns what it is, in a few words.
        UserError for what cannot be read, or a model of text alone.
        """
        if self._chat_model.vision is None:
            raise UserError(f"{self._chat_model.path} is a model of text alone, so it cannot be shown a {kind}.")
        notes = Notes()
        self._waiting.append(open_medium(kind, path, self._chat_model.vision, notes))
        _say(notes)
        return f"{kind} {len(self._waiting)} before the next question: {self._waiting[-1].description}"

    def ask(self, question: str) -> Generator[Piece, None, None]:
        """Pieces of the thought, if there is one, and of the answer, as they come; none ends inside a character. Notes
        tell which pictures are shown and which tools are called.

        Question and answer join the conversation at the end, also where the caller stops early, unless nothing was
        answered. Raises UserError for what cannot be asked; the conversation is then as before.
        """
        content: Any = question
        if self._chat_model.vision is not None:
            notes = Notes()
            content, media = content_of(question, self._waiting, self._chat_model.vision, notes)
            _say(notes)
            yield from self._named(media)
        steps: list[dict[str, Any]] = [{"role": "user", "content": content}]
        reply = _Reply()
        try:
            for rounds_left in range(self._cfg.max_tool_rounds if self._tools else 0, -2, -1):
                reply = _Reply()
                with closing(self._generate([*self.messages, *steps], reply)) as pieces:
                    yield from pieces
                if self._tools is None or not _calls(reply):
                    break
                if rounds_left < 0:
                    yield "note", f"max_tool_rounds: {self._cfg.max_tool_rounds}: the last call is not executed"
                    break
                said, reply = reply, _Reply()  # it becomes a message of the steps
                yield from self._execute(self._tools, said, steps, rounds_left)
        finally:
            if reply.answer:
                self.messages = [*self.messages, *steps, self._message(reply.thought, reply.answer)]
                self._waiting = []

    def _generate(self, messages: list[dict[str, Any]], reply: _Reply) -> Generator[Piece, None, None]:
        """The model's next message, piece by piece, also collected in `reply`."""
        model, notes = self._chat_model, Notes()
        prompt_ids = model.template.prompt_ids(messages, self.tools, model.enable_thinking)
        try:
            prompt = self._with_pictures(prompt_ids, messages, notes)
            answers = self.session.answer(prompt, self._limits, self._sampling, self._turn, notes)
        except BadRecord as error:
            raise DataError(f"{error.reason}. Hint: {error.hint}.") from None
        _say(notes)
        parser = ThoughtParser(ids_open_thought(prompt_ids, model.tokenizer.decode))
        decoder, calls = StreamDecoder(model.tokenizer), CallFilter(hides=self.has_tools)
        self._turn += 1
        for answer in answers:
            pieces = parser.push(decoder.push(answer.ids[-1]) if answer.stop_id is None else "")
            if answer.stop:
                pieces += [*parser.push(decoder.flush()), *parser.flush()]
            for part, text in pieces:
                if part == "thought":
                    reply.thought += text
                    yield "thought", text
                    continue
                reply.answer += text
                if shown := calls.push(text):
                    yield "answer", shown
            if answer.stop and (shown := calls.flush()):
                yield "answer", shown
            if answer.stop == "length":
                log.info(f"the answer was truncated at max_new_tokens: {self._cfg.max_new_tokens}")

    def _with_pictures(self, ids: list[int], messages: list[dict[str, Any]], notes: Notes) -> list[int] | PicturePrompt:
        """The prompt with the pictures of the messages."""
        vision, media = self._chat_model.vision, list(media_of(messages))
        if vision is None or not media:
            return ids
        plans = plan_media(media, MediaReader(Path.cwd(), vision.allow_urls), vision.settings, vision.video, notes)
        return picture_prompt(ids, plans, MediaTokens.of(self._chat_model.tokenizer), vision)

    def _execute(
        self, tools: ImageTools, reply: _Reply, steps: list[dict[str, Any]], rounds_left: int
    ) -> Generator[Piece, None, None]:
        """Append the model's message and the results of its calls to `steps`. Without a round left the results say so,
        and the model has to answer.
        """
        parsed = read_calls(reply.answer)
        named = [(f"call{self._turn}-{number}", call) for number, call in enumerate(parsed.calls, 1)]
        calls = [{"id": name, "type": "function", "function": call} for name, call in named]
        steps.append(self._message(reply.thought, parsed.text if calls else reply.answer, calls))
        if not calls:
            result = failure(
                'the call cannot be read; write valid JSON: <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
            )
            yield "note", f"a call of the model cannot be read: {reply.answer.strip()[:200]}"
            steps.append({"role": "tool", "content": result.content})
        for name, call in named:
            yield "note", f"the model calls {format_call(call)}"
            if rounds_left:
                result = tools.run(call, [*self.messages, *steps])
            else:
                result = failure("no more calls are allowed; answer with what is known")
            number = _num_pictures([*self.messages, *steps])
            steps.append({"role": "tool", "tool_call_id": name, "name": call["name"], "content": result.content})
            yield "note", _numbers(number, _num_pictures([steps[-1]])) + result.note

    def _message(self, thought: str, answer: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """A message of the model. Calls that are not executed stay in the text."""
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if thought and self._keeps_thoughts:
            message["reasoning_content"] = thought
        return message | ({"tool_calls": calls} if calls else {})

    def _named(self, media: list[Medium]) -> Generator[Piece, None, None]:
        """A note for each picture and video of a question, with its number in the conversation."""
        counts = {"image": 0, "video": 0}
        for part in media_of(self.messages):
            counts[part["type"]] += 1
        for medium in media:
            kind = medium.part["type"]
            counts[kind] += 1
            yield "note", f"{'Picture' if kind == 'image' else 'Video'} {counts[kind]}: {medium.description}"


def _tools(cfg: Config, chat_model: ChatModel) -> ImageTools | None:
    if not cfg.chat_tools:
        return None
    if chat_model.vision is None:
        raise ConfigError(f"chat_tools: {chat_model.path} is a model of text alone. Leave the key out.")
    for part in ("tools", "tool_calls", "results of tools"):
        if not chat_model.template.shows(part):
            raise ConfigError(
                f"chat_tools: chat template {chat_model.template.name} does not show {part}. Set chat_template: "
                "vl_thinking, or leave chat_tools out."
            )
    return ImageTools(cfg.chat_tools, chat_model.vision, cfg.image_search_dir)


def _calls(reply: _Reply) -> bool:
    """Whether a reply calls a tool, readably or not."""
    parsed = read_calls(reply.answer)
    return bool(parsed.calls or parsed.unreadable)


def _num_pictures(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for part in media_of(messages))


def _numbers(before: int, added: int) -> str:
    """ "Picture 2: ", or "Pictures 2 to 4: "; nothing where none was added."""
    if not added:
        return ""
    return f"Picture {before + 1}: " if added == 1 else f"Pictures {before + 1} to {before + added}: "


def _say(notes: Notes) -> None:
    for doubt in sorted(notes.doubts):
        log.once(doubt)  # a picture is opened and, with the prompt, encoded
