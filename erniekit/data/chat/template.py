"""Conversations -> token ids. A template is a jinja file with transformers' conventions, the same kind of file that a
checkpoint carries as chat_template.jinja.

For every answer of a conversation the template is rendered twice: up to the question, with the generation prompt, and
up to the answer. What the second has more than the first is the answer, up to and including the token that ends it;
that and nothing else is trained. Prompt and answer are tokenised apart from each other, so that training sees exactly
what generation continues.

Text inside messages stays text: special tokens that somebody typed are cut apart before tokenising (see
Tokenizer.encode_plain). The one exception is <think> and </think> inside an assistant's message, which is how thoughts
are given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from erniekit.data.batch import IGNORE
from erniekit.data.chat.jinja_sandbox import BoundedTemplate, TemplateFault
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.chat.tokenizer_files import read_chat_template
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, DataError, UserError
from erniekit.utils.user_files import read_text

BUILT_IN = Path(__file__).parent / "templates"
ALIASES = {  # names used by other toolkits
    **dict.fromkeys(("ernie_nothink",), "text"),
    **dict.fromkeys(("ernie", "ernie_thinking"), "thinking"),
    **dict.fromkeys(("ernie_vl", "ernie_vl_nothink"), "vl"),
    **dict.fromkeys(("ernie_vl_thinking",), "vl_thinking"),
}
THOUGHT_TAGS, THOUGHT_KEYS = ("<think>", "</think>"), ("content", "reasoning_content")
# token that may end a turn -> the variable by which a template may write it
TURN_ENDS = {"<|end_of_sentence|>": "sep_token", "<|im_end|>": "<|im_end|>"}
_PROBE = "zq7"  # looked for in a rendered conversation
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: never part of a text

Messages = Sequence[dict[str, Any]]


class Segment(NamedTuple):
    """A stretch of token ids of which all are trained (an answer and its end token) or none."""

    ids: list[int]
    is_target: bool


class Turn(NamedTuple):
    """One answer: the text between the answer before it and itself, its own text, and the token that ends it."""

    prompt: str
    answer: str
    end: str
    number: int  # of the assistant messages


class Template:
    """A chat template together with its tokenizer. Made by load_template.

    `name` says which it is, `source` is its jinja text (written beside the weights as chat_template.jinja), `stop_ids`
    are the ids at which generation ends, `trained_end_ids` those with which a trained answer ends. `ends_with_eos`:
    whether the last answer's <|end_of_sentence|> is eos in the input too, and not only as its label.
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
        # `labels` has eos in the place of <|end_of_sentence|>
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
        """The conversation as text. `variables` reach the template by their names.

        Raises DataError for what the template refuses.
        """
        return self._render(self._plain(messages), tools, add_generation_prompt, variables)

    def encode(
        self, messages: Messages, tools: Sequence[Any] | None = None, label: Sequence[int] | None = None
    ) -> list[Segment]:
        """The single training sequence of a conversation; see encode_all.

        Raises DataError where the template makes more than one of it.
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
        """The training sequences of a conversation that ends with an answer: one, as a rule.

        A template that drops earlier thoughts shows a later question another past than the one its earlier answers were
        given in; a conversation then makes one sequence for each such answer. `label` has a 0 or 1 for each assistant
        message (default: all 1); at 0 the answer is shown but carries no loss, and a sequence without any loss is left
        out unless nothing would remain. The last answer of a sequence ends with eos where the template writes
        <|end_of_sentence|>. Raises DataError for a conversation with an open turn, one that the template refuses, and
        one of which it would leave something out (tools, their calls or results, thoughts).
        """
        messages = self._plain(messages)
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("a training conversation must end with the assistant's answer: remove the open turn")
        answers = sum(message["role"] == "assistant" for message in messages)
        self._check_shown(messages, tools)
        label = [1] * answers if label is None else label
        if len(label) != answers:
            raise DataError(f"label has {len(label)} entries for {answers} answers: give one 0 or 1 for each")
        messages, tools, mark = self._guard(messages, tools)
        sequences = self._sequences(messages, tools, {}, strict=True)
        trained = [turns for turns in sequences if any(label[turn.number] for turn in turns)] or sequences[-1:]
        return [self._segments(turns, label, mark) for turns in trained]

    def labels(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """(input ids, labels) of one sequence. The labels are shifted: labels[t] is the target of position t, or -100.

        Where an answer ends with <|end_of_sentence|> its target is eos, as at the end of the conversation: that is what
        the published models were trained to say, and what stops generation everywhere.
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
        """Ids for generation to continue: the conversation so far and the generation prompt, as training has them.
        Without `add_generation_prompt` only the conversation, its last answer included.

        `enable_thinking` reaches the template; None leaves the choice to the template. Raises DataError as encode_all.
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

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in the form that the jinja program gets."""
        return _plain(messages)

    def _cut(self, text: str, keep: Sequence[str] = ()) -> list[str]:
        """`text` in parts so that no part holds what only the template may write, except what is in `keep`."""
        return self.tokenizer.cut_special(text, keep)

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
        """Raise DataError if the template leaves out something that this conversation has. Published templates that
        know no tools do so without a word: a model would learn calls as empty answers.
        """
        present = {"tools": bool(tools)}
        for message in messages:
            for part in ("tool_calls", "reasoning_content"):
                present[part] = present.get(part) or bool(message.get(part))
            present["results of tools"] = present.get("results of tools") or message["role"] == "tool"
        for part in (part for part, there in present.items() if there):
            if not self.shows(part):
                raise DataError(
                    f"chat template {self.name} does not show {part}: they would be lost. Choose one that does "
                    "(`template: text` has the same turns, `template: thinking` has thoughts too), or remove them."
                )

    def shows(self, part: str) -> bool:
        """Whether the template shows or refuses `part` of a conversation: "tools", "tool_calls", "results of tools" or
        "reasoning_content". What it refuses it does not leave out in silence.
        """
        if part not in self._shows:
            probe, probe_tools = _probe(part)
            try:
                self._shows[part] = _PROBE in self._render(probe, probe_tools, False, {})
            except DataError:
                self._shows[part] = True
        return self._shows[part]

    def _sequences(self, messages: Messages, tools: Any, variables: dict[str, Any], strict: bool) -> list[list[Turn]]:
        """The answers, grouped so that within a group each prompt continues what the answer before it ended with.

        An answer that does not continue its own prompt raises DataError if `strict`; otherwise it is no turn.
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
                    "one as <think>...</think> in the answer; or choose another template (`template: text`)."
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
        """Ids of rendered text, whose special tokens are the template's own except where `mark` cuts one apart."""
        return self.tokenizer.encode_parts(text.split(mark) if mark else [text])

    def _guard(self, messages: Messages, tools: Any) -> tuple[Messages, Any, str]:
        """Put a mark inside each special token that the contents hold; returns the mark, "" if there is none to put."""
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

    `name` is a built-in one (a file of erniekit/data/chat/templates, or an alias) or the path of a .jinja file. Without
    it the model's own template is used: that of the directory `beside` (an adapter's), or else that of the tokenizer's
    directory; and where there is none the built-in `text`. Where the named one differs from the model's own a log line
    says so. Raises ConfigError for an unknown name and for a built-in template whose special tokens the tokenizer
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
    """A built-in template, or that of a .jinja file."""
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
    """A log line where config.yaml beside a model's weights names another template than `template`, and no file says
    which it was: checkpoints had none before templates were written beside the weights.
    """
    try:
        settings = yaml.safe_load(read_text(model_dir / "config.yaml", ConfigError))
    except (OSError, UserError, yaml.YAMLError):
        return  # the file is a hint, no more
    name = settings.get("chat_template") if isinstance(settings, dict) else None
    if not isinstance(name, str) or read_chat_template(model_dir) is not None:
        return
    try:
        if load_template(template.tokenizer, name).source == template.source:
            return
    except ConfigError:
        pass  # its file is gone, which does not make the difference smaller
    log.warning(
        f"{model_dir / 'config.yaml'}: trained with chat_template: {name}; now it is asked with {template.name}. "
        f"Set chat_template: {name} to ask as in training"
    )


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """Messages whose content is a string: None becomes "", a list of text parts is joined. Checked, not changed in
    place.
    """
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number + 1} has no role: write system, user, assistant or tool")
        content = message.get("content")
        if content is None:
            content = ""
        elif isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise DataError(f"message {number + 1} has content other than text, which this template cannot show")
            content = "".join(part["text"] for part in content)
        elif not isinstance(content, str):
            raise DataError(f"message {number + 1}: content must be text, not {type(content).__name__}")
        result.append({**message, "content": content})
    return result


def _probe(part: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The shortest conversation, and its tools, that has `part`; only that part holds _PROBE."""

    def text(of: str) -> str:
        return _PROBE if of == part else "f"

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
    return messages[part], [{"type": "function", "function": function}]


def _strings(value: Any) -> list[str]:
    """All strings inside nested lists and objects (keys too)."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []
