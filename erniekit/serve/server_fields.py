"""The fields of requests: what each may be, which are honoured, which are ignored and which are refused.

The tables here are read by `read_fields` and by the OpenAPI document, so that the two cannot differ.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erniekit.serve.server_errors import ApiError

MAX_N, MAX_TOP_LOGPROBS, MAX_STOPS, MAX_STOP_CHARACTERS, MAX_BIASES = 128, 20, 16, 1000, 1024
_INT64 = 2**63 - 1

_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


@dataclass(frozen=True)
class Field:
    """A field: the types of its values, bounds of a number, allowed words, and one line about it.

    neutral: values that ask for nothing; of a refused field only they pass. why: why it is refused; empty: it is
    honoured. ignored: any value passes, since none can change the answer.
    """

    types: tuple[type, ...]
    doc: str
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    choices: tuple[str, ...] = ()
    neutral: tuple[Any, ...] = ()
    why: str = ""
    ignored: bool = False
    required: bool = False

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the field's values."""
        names = [_NAMES[kind] for kind in self.types]
        if "number" in names and "integer" in names:
            names.remove("integer")
        schema: dict[str, Any] = {"description": self.doc}
        if self.ignored:
            return schema
        if self.why:
            return schema | {"enum": [None, *self.neutral]}
        schema["type"] = (
            names[0] if self.required and len(names) == 1 else [*names, *([] if self.required else ["null"])]
        )
        bounds = {"minimum": self.ge, "maximum": self.le, "exclusiveMinimum": self.gt}
        schema |= {name: bound for name, bound in bounds.items() if bound is not None}
        if self.choices:
            schema["enum"] = [*self.choices, *([] if self.required else [None])]
        if "array" in names:
            schema["items"] = {}
        return schema


def _number(doc: str, ge: float | None = None, le: float | None = None, gt: float | None = None) -> Field:
    return Field((int, float), doc, ge, le, gt)


def _whole(doc: str, ge: int | None = None, le: int | None = None) -> Field:
    return Field((int,), doc, ge, le)


def _refused(doc: str, why: str, *neutral: Any) -> Field:
    return Field((), doc, why=why, neutral=neutral)


_IGNORED = {
    name: Field((), "Ignored: it cannot change the answer.", ignored=True)
    for name in (
        "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_options "
        "prompt_cache_retention verbosity priority cache_salt"
    ).split()
}

_SAMPLING: dict[str, Field] = {
    "model": Field((str,), "The model's name, as /v1/models lists it (default: the model without an adapter)."),
    "max_tokens": _whole("The largest number of tokens to generate; what is left of the context at most.", 0, _INT64),
    "min_tokens": _whole("The number of tokens to generate before the answer may end.", 0, _INT64),
    "temperature": _number("Randomness of the choice; 0: always the likeliest token.", 0, 100),
    "top_p": _number("Draw among the likeliest tokens that together reach this probability; 0: the likeliest.", 0, 1),
    "top_k": _whole("Draw among the k likeliest tokens; 0 or -1: all.", -1, _INT64),
    "repetition_penalty": _number("Divide the scores of tokens seen so far by this; 1: off.", gt=0, le=100),
    "frequency_penalty": _number("Lower a token's score by this for each time it was generated.", -2, 2),
    "presence_penalty": _number("Lower a token's score by this once it was generated.", -2, 2),
    "seed": _whole("Requests with equal seeds get equal answers; not given: a fresh one.", -_INT64 - 1, _INT64),
    "n": _whole("The number of answers.", 1, MAX_N),
    "stop": Field((str, list), f"Texts that end the answer, up to {MAX_STOPS}; they are not part of it."),
    "stop_token_ids": Field((list,), "Token ids that end the answer; they are not part of it."),
    "include_stop_str_in_output": Field((bool,), "Whether the text that ended the answer is part of it."),
    "ignore_eos": Field((bool,), "Whether the model's end tokens do not end the answer."),
    "skip_special_tokens": Field((bool,), "Whether special tokens are left out of the text (default: true)."),
    "stream": Field((bool,), "Whether the answer comes in pieces (server-sent events)."),
    "stream_options": Field((dict,), "Of a stream: {include_usage, continuous_usage_stats}."),
    "logit_bias": Field((dict,), "Added to the scores of tokens: {id: -100 to 100}."),
    "min_p": _number("Draw among tokens with at least this share of the likeliest one's probability; 0: all.", 0, 1),
    "bad_words": _refused("Forbidden texts.", "words cannot be forbidden", []),
    "return_token_ids": Field(
        (bool,), "Whether the ids of the prompt and of the answer are sent; scores then have the end token's, too."
    ),
    "response_format": Field(
        (dict,), 'The form of the answer: {"type": "text", "json_object" or "json_schema", "json_schema": {"schema"}}.'
    ),
    "structured_outputs": Field(
        (dict,), "The form of the answer: one of {json, json_object, regex, choice, grammar} (vLLM's name)."
    ),
    "guided_json": Field((dict, str), "A JSON schema that the answer follows (FastDeploy's name)."),
    "guided_regex": Field((str,), "A regular expression that the answer matches."),
    "guided_choice": Field((list,), "Texts of which the answer is one."),
    "guided_grammar": Field((str,), "A grammar of the answer, in llguidance's form of Lark."),
}

CHAT: dict[str, Field] = {
    **_SAMPLING,
    **_IGNORED,
    "messages": Field((list,), "The conversation: {role, content, ...} each.", required=True),
    "max_completion_tokens": _whole("As max_tokens, and decides where both are given.", 0, _INT64),
    "logprobs": Field((bool,), "Whether the log-probability of each token is sent, before temperature and penalties."),
    "top_logprobs": _whole("The number of likeliest tokens whose log-probabilities are sent.", 0, MAX_TOP_LOGPROBS),
    "tools": Field((list,), "The functions that the model may call."),
    "tool_choice": Field(
        (str, dict), 'auto, none, required, or {"type": "function", "function": {"name"}}: that one is called.'
    ),
    "parallel_tool_calls": Field((bool,), "false: only the first call of an answer is sent."),
    "chat_template_kwargs": Field((dict,), "Variables of the chat template: {enable_thinking}."),
    "enable_thinking": Field((bool,), "Whether the model thinks before it answers; as in chat_template_kwargs."),
    "reasoning_effort": Field(
        (str,),
        "none: the model does not think; other words leave that to the template.",
        choices=("none", "minimal", "low", "medium", "high", "xhigh"),
    ),
    "modalities": _refused("Kinds of answers.", "answers are text", ["text"]),
    "add_generation_prompt": _refused("Whether the model answers.", "it always does", True),
    "continue_final_message": _refused("Continues a message.", "use /v1/completions with a prompt", False),
    "audio": _refused("Sound.", "answers are text"),
    "functions": _refused("The older form of tools.", "use tools", []),
    "function_call": _refused("The older form of tool_choice.", "use tool_choice", "none", "auto"),
    "prediction": _refused("A guess of the answer.", "guesses are not used"),
    "web_search_options": _refused("Search.", "the server opens no addresses"),
    "moderation": _refused("Moderation.", "there is none"),
    "mm_processor_kwargs": _refused("Settings of pictures.", "the server's YAML has them", {}),
    "thinking_token_budget": _refused("A bound on the thought.", "thoughts cannot be bounded"),
    "reasoning_max_tokens": _refused("A bound on the thought.", "thoughts cannot be bounded"),
    "prompt_logprobs": _refused("Scores of the prompt.", "use /v1/completions with echo and logprobs", 0, False),
}

COMPLETION: dict[str, Field] = {
    **_SAMPLING,
    **_IGNORED,
    "prompt": Field((str, list), "A text, a list of texts, token ids, or a list of lists of token ids.", required=True),
    "echo": Field((bool,), "Whether the prompt is part of the text."),
    "logprobs": _whole("The number of likeliest tokens whose log-probabilities are sent beside each token's.", 0, 20),
    "return_tokens_as_token_ids": Field((bool,), "Whether tokens beside the scores are token_id:N instead of texts."),
    "best_of": _refused("Several attempts.", "use n", 1),
    "suffix": _refused("The text behind the gap.", "these models continue a prompt only", ""),
    "prompt_logprobs": _refused("Scores of the prompt.", "use echo and logprobs", 0, False),
}

TOKENIZE: dict[str, Field] = {
    "model": _SAMPLING["model"],
    "prompt": Field((str,), "A text."),
    "messages": Field((list,), "A conversation, instead of `prompt`."),
    "tools": Field((list,), "The functions that the model may call, beside `messages`."),
    "add_special_tokens": Field((bool,), "Whether special tokens in `prompt` are one id each (default: true)."),
    "add_generation_prompt": Field((bool,), "Whether the prompt of an answer is added to `messages` (default: true)."),
    "return_token_strs": Field((bool,), "Whether the text of each token is sent."),
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
}

DETOKENIZE: dict[str, Field] = {
    "model": _SAMPLING["model"],
    "tokens": Field((list,), "Token ids.", required=True),
}

LOAD_ADAPTER: dict[str, Field] = {
    "lora_name": Field((str,), "The name by which requests name the adapter as their model.", required=True),
    "lora_path": Field((str,), "Its directory on the server's machine, below lora_directory.", required=True),
}

UNLOAD_ADAPTER: dict[str, Field] = {
    "lora_name": LOAD_ADAPTER["lora_name"],
    "lora_int_id": Field((), "Ignored: adapters have names.", ignored=True),
}

STREAM_OPTIONS: dict[str, Field] = {
    "include_usage": Field((bool,), "Whether a last piece has the numbers of tokens."),
    "continuous_usage_stats": Field((bool,), "Whether each piece has them."),
    "include_obfuscation": Field((bool,), "Ignored: padding is not sent.", ignored=True),
}

TEMPLATE_OPTIONS: dict[str, Field] = {
    "enable_thinking": Field((bool,), "Whether the model thinks before it answers."),
    "options": Field((dict,), 'The same as {"thinking_mode": "open" or "close"}.'),
}


def read_fields(body: Mapping[str, Any], table: Mapping[str, Field], where: str = "") -> dict[str, Any]:
    """The fields of a request that are given and honoured; null is not given. Raises ApiError, with the field's name,
    for an unknown field, a value that the field does not take, and a wish that cannot be granted.
    """
    values: dict[str, Any] = {}
    for name, value in body.items():
        shown = f"{where}{name}"
        field = table.get(name)
        if field is None:
            raise ApiError(400, f"{shown[:80]}: unknown field{_nearest(name, table)}.", shown[:80], "unknown_field")
        if field.ignored or value is None:
            continue
        if field.why:
            if value not in field.neutral:
                raise ApiError(400, f"{shown}: {field.why}. Leave the field out.", shown, "unsupported_value")
            continue
        values[name] = _checked(value, field, shown)
    for name, field in table.items():
        if field.required and name not in values:
            raise ApiError(400, f"{where}{name}: the field is missing.", f"{where}{name}", "missing_field")
    return values


def _checked(value: Any, field: Field, name: str) -> Any:
    """The value of a field, whole numbers as int. Raises ApiError for one that it does not take."""
    if int in field.types and float not in field.types and isinstance(value, float) and value.is_integer():
        value = int(value)
    is_of_type = isinstance(value, field.types) and (not isinstance(value, bool) or bool in field.types)
    if not is_of_type:
        names = [_NAMES[kind] for kind in field.types if kind is not int or float not in field.types]
        message = f"{name}: expected {' or '.join(names)}, got {type_name(value)}."
        raise ApiError(400, message, name, "invalid_type")
    expected = _not_within(value, field)
    if expected:
        raise ApiError(400, f"{name}: expected {expected}, got {str(value)[:40]}.", name, "invalid_value")
    return value


def _not_within(value: Any, field: Field) -> str:
    """What is expected, where a value of the right type is not; else nothing."""
    if isinstance(value, float) and math.isnan(value):  # of LLM; the server's JSON has none
        return "a number"
    if field.ge is not None and value < field.ge:
        return f"{field.ge} or more"
    if field.gt is not None and value <= field.gt:
        return f"more than {field.gt}"
    if field.le is not None and value > field.le:
        return f"at most {field.le}"
    return " or ".join(field.choices) if field.choices and value not in field.choices else ""


def type_name(value: Any) -> str:
    """JSON's name of a value's type."""
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _nearest(name: str, table: Mapping[str, Field]) -> str:
    close = difflib.get_close_matches(name[:80], table, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def text_list(value: Any, name: str) -> tuple[str, ...]:
    """The texts of `stop`: one, or a list of them. Raises ApiError for an empty one."""
    texts = [value] if isinstance(value, str) else value
    if len(texts) > MAX_STOPS:
        raise ApiError(400, f"{name}: at most {MAX_STOPS} texts, got {len(texts)}.", name, "invalid_value")
    for text in texts:
        if not isinstance(text, str):
            raise ApiError(400, f"{name}: expected texts, got {type_name(text)}.", name, "invalid_type")
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise ApiError(400, f"{name}: each text has 1 to {MAX_STOP_CHARACTERS} characters.", name, "invalid_value")
    return tuple(texts)


def id_list(value: list[Any], name: str, vocab_size: int) -> list[int]:
    """Token ids. Raises ApiError for one outside the vocabulary."""
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ApiError(400, f"{name}: expected token ids, got {type_name(item)}.", name, "invalid_type")
        if not 0 <= item < vocab_size:
            message = f"{name}: {str(item)[:40]} is outside the vocabulary, 0 to {vocab_size - 1}."
            raise ApiError(400, message, name, "invalid_value")
    return value


def bias_table(value: Mapping[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The entries of logit_bias. Raises ApiError for what is no id of the vocabulary, or no score."""
    if len(value) > MAX_BIASES:
        raise ApiError(
            400, f"logit_bias: at most {MAX_BIASES} tokens, got {len(value)}.", "logit_bias", "invalid_value"
        )
    table = []
    for name, bias in value.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not 0 <= token < vocab_size or str(token) != name:  # "05" would be a second entry for 5
            message = f"logit_bias: {name[:40]!r} is not a token id, 0 to {vocab_size - 1}."
            raise ApiError(400, message, "logit_bias", "invalid_value")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ApiError(400, f"logit_bias: expected numbers, got {type_name(bias)}.", "logit_bias", "invalid_type")
        if not -100 <= bias <= 100:
            message = f"logit_bias: expected -100 to 100, got {str(bias)[:40]}."
            raise ApiError(400, message, "logit_bias", "invalid_value")
        table.append((token, float(bias)))
    return tuple(table)
