"""Chat templates: from conversations to token ids. A template is a jinja file with the conventions of transformers, the
same kind of file as chat_template.jinja in a model directory.

For every answer of a conversation the template is rendered twice: up to the question, with the generation prompt, and
up to the answer. The text that the second rendering adds is the answer, up to and including the token that ends it, and
only this is trained. Prompt and answer are tokenised separately, so that training sees the same prompt ids as
generation.

Text inside messages stays text: special tokens that a user has typed are split before tokenising (see
Tokenizer.encode_plain). The only exceptions are <think> and </think> in an assistant's message, which mark thoughts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erniekit.config.stored import stored_settings
from erniekit.data.chat.jinja_sandbox import BoundedTemplate, TemplateFault
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.chat.tokenizer_files import read_chat_template
from erniekit.data.packed_batch import IGNORE
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError
from erniekit.utils.user_files import read_text
from erniekit.utils.wording import count_of

BUILT_IN = Path(__file__).parent / "templates"
ALIASES = {  # names used by other toolkits
    **dict.fromkeys(("ernie_nothink",), "text"),
    **dict.fromkeys(("ernie", "ernie_thinking"), "thinking"),
    **dict.fromkeys(("ernie_vl", "ernie_vl_nothink"), "vl"),
    **dict.fromkeys(("ernie_vl_thinking",), "vl_thinking"),
}
THOUGHT_TAGS, THOUGHT_KEYS = ("<think>", "</think>"), ("content", "reasoning_content")
# token that may end a turn -> the variable with which a template may write it
TURN_ENDS = {"<|end_of_sentence|>": "sep_token", "<|im_end|>": "<|im_end|>"}
_PROBE = "zq7"  # a marker that is searched for in a rendered conversation
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: never part of a text

Messages = Sequence[dict[str, Any]]


class Segment(NamedTuple):
    """Consecutive token ids that are either all trained (an answer and its end token) or all not trained."""

    ids: list[int]
    is_target: bool


class Turn(NamedTuple):
    """One answer: the text between the previous answer and this one, its text, and the token that ends it."""

    prompt: str
    answer: str
    end: str
    number: int  # the index among the assistant messages


class Template:
    """A chat template together with its tokenizer, made by load_template.

    `source` is its jinja text, which is saved with the weights as chat_template.jinja. `stop_ids` are the ids at which
    generation ends, `trained_end_ids` those with which a trained answer ends. `ends_with_eos`: whether the last
    answer's <|end_of_sentence|> becomes eos in the input too, and not only in its label.
    """

    ends_with_eos = True

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        self.name, self.source = name, source
        self.tokenizer = tokenizer
        self._said_one_mode = False
        self._shows: dict[str, bool] = {}
        try:
            self._jinja = BoundedTemplate(source)
        except TemplateFault as error:
            raise ConfigError(
                f"chat template {name}: not valid jinja: {error}. Fix it, or choose another: `chat_template: text`."
            ) from None
        written = [
            text
            for text, variable in TURN_ENDS.items()
            if text in tokenizer.special_tokens and (text in source or variable in source)
        ]
        self._ends = [*written, tokenizer.role_tokens["eos_token"]]
        self.stop_ids = sorted({tokenizer.token_id(text) for text in self._ends})
        # `labels` replaces <|end_of_sentence|> by eos
        self.trained_end_ids = [i for i in self.stop_ids if i != tokenizer.sep_id]

    def __reduce__(self) -> tuple[Any, ...]:
        return Template, (self.name, self.source, self.tokenizer)  # compiled jinja cannot be sent to a worker

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Renders the conversation as text. `variables` are passed to the template by name.

        Raises DataError if the template refuses the conversation.
        """
        return self._render(self._plain(messages), tools, add_generation_prompt, variables)

    def encode(
        self, messages: Messages, tools: Sequence[Any] | None = None, label: Sequence[int] | None = None
    ) -> list[Segment]:
        """The single training sequence of a conversation; see encode_all.

        Raises DataError if the template makes more than one sequence.
        """
        sequences = self.encode_all(messages, tools, label)
        if len(sequences) > 1:
            raise DataError(
                f"chat template {self.name} rewrites earlier turns, so this conversation makes {len(sequences)} "
                "training sequences instead of one: use encode_all"
            )
        return sequences[0]

    def encode_all(
        self, messages: Messages, tools: Sequence[Any] | None = None, label: Sequence[int] | None = None
    ) -> list[list[Segment]]:
        """The training sequences of a conversation that ends with an answer; normally one.

        A template that drops earlier thoughts shows an earlier answer differently once a later question follows. Such
        answers are not part of one sequence, and the conversation makes one sequence for each of them. `label` has a 0
        or 1 for each assistant message (default: all 1). An answer with 0 is shown but carries no loss; a sequence
        without any loss is left out unless no sequence would remain. The last answer of a sequence ends with eos if the
        template writes <|end_of_sentence|>. Raises DataError for a conversation with an open turn, for one that the
        template refuses, and if the template would leave something out (tools, their calls or results, thoughts).
        """
        messages = self._plain(messages)
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("a training conversation must end with the assistant's answer: remove the open turn")
        answers = sum(message["role"] == "assistant" for message in messages)
        self._check_shown(messages, tools)
        label = [1] * answers if label is None else label
        if len(label) != answers:
            raise DataError(
                f"label has {count_of(len(label), 'entry', 'entries')} for {count_of(answers, 'answer')}: give one 0 "
                "or 1 for each"
            )
        messages, tools, mark = self._guard(messages, tools)
        sequences = self._sequences(messages, tools, {}, strict=True)
        trained = [turns for turns in sequences if any(label[turn.number] for turn in turns)] or sequences[-1:]
        return [self._segments(turns, label, mark) for turns in trained]

    def labels(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """(input ids, labels) of one sequence. The labels are shifted: labels[t] is the target of position t, or -100.

        If an answer ends with <|end_of_sentence|>, its target is eos, also within the conversation: the published
        models were trained to output eos, and every inference tool stops at it.
        """
        ids: list[int] = []
        targets: list[int] = []
        sep, eos = self.tokenizer.sep_id, self.tokenizer.eos_id
        for segment in segments:
            ids += segment.ids
            if segment.is_target:
                targets += [eos if i == sep else i for i in segment.ids]
            else:
                targets += [IGNORE] * len(segment.ids)
        return ids, [*targets[1:], IGNORE]

    def prompt_ids(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids that generation continues: the conversation so far and the generation prompt, as in training. Without
        `add_generation_prompt` only the conversation, including its last answer.

        `enable_thinking` is passed to the template; None leaves the choice to the template. Raises DataError like
        encode_all.
        """
        variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if variables and "enable_thinking" not in self.source and not self._said_one_mode:
            self._said_one_mode = True
            log.warning(f"enable_thinking has no effect: chat template {self.name} knows only one mode")
        messages = self._plain(messages)
        self._check_shown(messages, tools)
        messages, tools, mark = self._guard(messages, tools)
        prompt = self._render(messages, tools, add_generation_prompt, variables)
        ids: list[int] = []
        for turns in self._sequences(messages, tools, variables, strict=False)[-1:]:
            past = "".join(turn.prompt + turn.answer + turn.end for turn in turns)
            if prompt.startswith(past):
                prompt = prompt[len(past) :]
                for turn in turns:
                    for text in (turn.prompt, turn.answer, turn.end):
                        ids += self._ids(text, mark)
        return ids + self._ids(prompt, mark)

    def ids_between(self, before: Messages, after: Messages) -> tuple[list[int], int]:
        """What stands between the end token of the assistant's message that `before` ends with and its next answer,
        with the messages `after` in between: the ids, and the id of that end token as training reads it (training
        predicts eos there, see `labels`).

        Raises DataError like encode_all, and if the template shows `before` differently once `after` follows.
        """
        plain = self._plain([*before, *after])
        self._check_shown(plain, None)
        messages, _, mark = self._guard(plain, None)
        prompt = self._render(messages, None, True, {})
        turns = self._sequences(messages[: len(before)], None, {}, strict=True)[-1]
        past = "".join(turn.prompt + turn.answer + turn.end for turn in turns)
        if not prompt.startswith(past):
            raise DataError(
                f"chat template {self.name} rewrites earlier turns once others follow, so that what was generated does "
                "not continue. Choose another one, such as chat_template: text."
            )
        return self._ids(prompt[len(past) :], mark), self.tokenizer.token_id(turns[-1].end)

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in the form that the jinja program expects."""
        return _plain(messages)

    def _cut(self, text: str, keep: Sequence[str] = ()) -> list[str]:
        """Splits `text` so that no part contains a token that only the template may write, except those in `keep`."""
        return self.tokenizer.split_special(text, keep)

    def _render(self, messages: Messages, tools: Any, add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        try:
            return self._jinja.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.role_tokens,
                **variables,
            )
        except TemplateFault as error:
            raise DataError(f"chat template {self.name} refuses the conversation: {error}") from None

    def _check_shown(self, messages: Messages, tools: Any) -> None:
        """Raise DataError if the template leaves out something that this conversation has. Published templates without
        tools ignore them silently, so that a model would be trained on empty answers instead of calls.
        """
        present = {"tools": bool(tools)}
        for message in messages:
            for feature in ("tool_calls", "reasoning_content"):
                present[feature] = present.get(feature) or bool(message.get(feature))
            present["results of tools"] = present.get("results of tools") or message["role"] == "tool"
        for feature in (feature for feature, is_present in present.items() if is_present):
            if not self.shows(feature):
                raise DataError(
                    f"chat template {self.name} does not show {feature}: they would be lost. Choose one that does "
                    "(`chat_template: text` has the same turns, `chat_template: thinking` has thoughts too), or remove "
                    "them."
                )

    def shows(self, part: str) -> bool:
        """Whether the template shows or refuses `part` of a conversation: "tools", "tool_calls", "results of tools" or
        "reasoning_content". A template that refuses something does not leave it out silently.
        """
        if part not in self._shows:
            probe, probe_tools = _probe(part)
            try:
                self._shows[part] = _PROBE in self._render(probe, probe_tools, False, {})
            except DataError:
                self._shows[part] = True
        return self._shows[part]

    def _sequences(self, messages: Messages, tools: Any, variables: dict[str, Any], strict: bool) -> list[list[Turn]]:
        """The answers in groups: within a group, each prompt continues the text that the previous answer ended with.

        An answer that does not continue its own prompt raises DataError if `strict`; otherwise it is left out.
        """
        sequences: list[list[Turn]] = []
        past, number = "", -1
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            number += 1
            prompt = self._render(messages[:i], tools, True, variables)
            full = self._render(messages[: i + 1], tools, False, variables)
            rest = full[len(prompt) :] if full.startswith(prompt) else ""
            ends = [(rest.find(end), end) for end in self._ends if end in rest]
            if not ends and not strict:
                continue
            if not ends:
                raise DataError(
                    f"chat template {self.name}: answer {number + 1} does not continue the prompt that generation "
                    "would get, or has no end token, so it cannot be trained. If the prompt opens a thought, give "
                    "one as <think>...</think> in the answer; or choose another template (`chat_template: text`)."
                )
            position, end = min(ends)
            if not past or not prompt.startswith(past):
                past = ""
                sequences.append([])
            sequences[-1].append(Turn(prompt[len(past) :], rest[:position], end, number))
            past = prompt + rest[:position] + end
        return sequences

    def _segments(self, turns: Sequence[Turn], label: Sequence[int], mark: str) -> list[Segment]:
        segments = []
        for turn in turns:
            segments.append(Segment(self._ids(turn.prompt, mark), False))
            ids = self._ids(turn.answer, mark)
            end = self.tokenizer.token_id(turn.end)
            if self.ends_with_eos and turn is turns[-1] and end == self.tokenizer.sep_id:
                end = self.tokenizer.eos_id
            segments.append(Segment([*ids, end], bool(label[turn.number])))
        return segments

    def _ids(self, text: str, mark: str) -> list[int]:
        """Ids of rendered text. Its special tokens were written by the template, except those that contain `mark`."""
        return self.tokenizer.encode_parts(text.split(mark) if mark else [text])

    def _guard(self, messages: Messages, tools: Any) -> tuple[Messages, Any, str]:
        """Insert a mark into every special token in the contents. Returns the mark, or "" if none was needed."""
        texts = [*_strings(messages), *_strings(tools)]
        if len(self._cut("\n".join(texts))) == 1:
            return messages, tools, ""
        mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise DataError("the conversation holds all of the noncharacters U+FDD0 to U+FDEF: this is not text")

        def cut(value: Any, keep: Sequence[str] = ()) -> Any:
            if isinstance(value, str):
                return mark.join(self._cut(value, keep))
            if isinstance(value, dict):
                return {cut(key): cut(item, keep) for key, item in value.items()}
            return [cut(item, keep) for item in value] if isinstance(value, list | tuple) else value

        marked = []
        for message in messages:
            copy = cut(message)
            if message["role"] == "assistant":
                copy |= {key: cut(message[key], THOUGHT_TAGS) for key in THOUGHT_KEYS if key in message}
            marked.append(copy)
        return marked, cut(tools), mark


def load_template(tokenizer: Tokenizer, name: str | None = None, beside: Path | None = None) -> Template:
    """The chat template to use with a tokenizer.

    `name` is a built-in template (a file of erniekit/data/chat/templates, or an alias) or the path of a .jinja file. By
    default the model's own template is used: that in the directory `beside` (an adapter's), otherwise that in the
    tokenizer's directory, otherwise the built-in `text`. A log line reports a named template that differs from the
    model's own. Raises ConfigError for an unknown name, and for a built-in template whose special tokens the tokenizer
    lacks.
    """
    model_template = tokenizer.chat_template
    if beside is not None:
        model_template = read_chat_template(beside) or model_template
    if name is None and model_template is not None:
        return Template(model_template.file, model_template.source, tokenizer)
    template = _named_template(tokenizer, name or "text")
    if name is not None and model_template is not None and model_template.source != template.source:
        log.info(f"chat_template: {template.name} is used; the model's own, {model_template.file}, differs from it")
    return template


def _named_template(tokenizer: Tokenizer, name: str) -> Template:
    """A built-in template, or one from a .jinja file."""
    built_in = {path.stem: path for path in sorted(BUILT_IN.glob("*.jinja"))}
    chosen = ALIASES.get(name, name)
    path = built_in.get(chosen, Path(chosen).expanduser())
    if chosen not in built_in and (path.suffix != ".jinja" or not path.exists()):
        raise ConfigError(
            f"chat_template: {name!r} is neither a built-in template ({', '.join([*built_in, *ALIASES])}) nor a "
            ".jinja file. Leave the key out to use the checkpoint's own template, or `text` where it has none."
        )
    source = read_text(path, ConfigError)
    template = Template(chosen, source, tokenizer)
    lacking = [text for text in TURN_ENDS if text in source and text not in tokenizer.special_tokens]
    if lacking:
        raise ConfigError(
            f"chat_template: {chosen!r} ends its turns with {lacking[0]}, which the tokenizer in {tokenizer.directory} "
            "does not have. Choose a template made for this model."
        )
    return template


def say_if_trained_otherwise(model_dir: Path, template: Template) -> None:
    """Log a warning if config.yaml in a model directory names another template than `template` and the directory has no
    template file. Checkpoints of early versions have none.
    """
    name = (stored_settings(model_dir) or {}).get("chat_template")
    if not isinstance(name, str) or read_chat_template(model_dir) is not None:
        return
    try:
        if load_template(template.tokenizer, name).source == template.source:
            return
    except ConfigError:
        pass  # its file no longer exists, but the template still differs
    log.warning(
        f"{model_dir / 'config.yaml'}: trained with chat_template: {name}; it is now used with {template.name}. "
        f"Set chat_template: {name} to use it as in training"
    )


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Checks messages and returns copies whose content is a string: None becomes "", and a list of text parts is
    joined.
    """
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number + 1} has no role: write system, user, assistant or tool")
        content = message.get("content")
        if content is None:
            content = ""
        elif isinstance(content, list):
            if not all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in content):
                raise DataError(f"message {number + 1} has content other than text, which this template cannot show")
            content = "".join(item["text"] for item in content)
        elif not isinstance(content, str):
            raise DataError(f"message {number + 1}: content must be text, not {type(content).__name__}")
        result.append({**message, "content": content})
    return result


def _probe(feature: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The shortest conversation, and its tools, that has `feature`; only that feature contains _PROBE."""

    def text(owner: str) -> str:
        return _PROBE if owner == feature else "f"

    function = {"name": text("tools"), "description": "f", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": text("tool_calls"), "arguments": {}}}
    result = {"role": "tool", "tool_call_id": call["id"], "name": "f", "content": text("results of tools")}
    question = {"role": "user", "content": "q"}
    messages: dict[str, list[dict[str, Any]]] = {
        "tools": [question],
        "tool_calls": [question, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "results of tools": [question, {"role": "assistant", "content": "", "tool_calls": [call]}, result],
        "reasoning_content": [question, {"role": "assistant", "content": "a", "reasoning_content": _PROBE}],
    }
    return messages[feature], [{"type": "function", "function": function}]


def _strings(value: Any) -> list[str]:
    """All strings inside nested lists and objects (keys too)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []
