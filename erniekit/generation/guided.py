"""Answers that follow a grammar: a JSON schema, a regular expression, a choice of texts or a Lark grammar.

llguidance (https://github.com/guidance-ai/llguidance, extra `guided`) says which tokens may come next; here it becomes
the constraint of a request. Where the prompt ends inside a thought, the grammar begins behind `</think>`.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.generation import tool_calls
from erniekit.generation.request import Request
from erniekit.generation.thinking import CLOSE
from erniekit.utils.errors import UserError

Kind = Literal["json", "regex", "choice", "grammar", "calls"]
MAX_BYTES = 1 << 18  # of a grammar
# The spaces of json.dumps and of chat templates' tojson, and no others: a model could write spaces without end.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_STATE = "<state>"  # llguidance's errors describe its parser behind this word
_FORMATS = "date-time, time, date, duration, email, hostname, ipv4, ipv6, uuid and uri"  # those of llguidance, OpenAI's


@dataclass(frozen=True)
class Guide:
    """What an answer has to be. `kind` and `what`: "json" and a schema (a dict), "regex" and a pattern, "choice" and
    texts, "grammar" and a text in llguidance's form of Lark, "calls" and such a text with the rules `opening` and
    `closing` yet to be added for the tags of a call.
    """

    kind: Kind
    what: Any

    @classmethod
    def any_object(cls) -> "Guide":
        """Any JSON object."""
        return cls("json", {"type": "object"})

    @classmethod
    def calls(cls, tools: Sequence[dict[str, Any]], only_one: bool) -> "Guide":
        """One call of a function of `tools`, or several, as ERNIE's templates write them."""
        rules = ""
        for number, tool in enumerate(tools):
            function = tool["function"]
            schema = {"type": "object"} | (_tagged(function.get("parameters")) or {}) | {"x-guidance": _JSON}
            # A schema of its own: references in it ("#/$defs/...") begin at its root.
            name = json.dumps(function["name"], ensure_ascii=False)
            opening = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
            rules += (
                f'body_{number}: {opening} arguments_{number} "}}"\narguments_{number}: %json {json.dumps(schema)}\n'
            )
        any_body = " | ".join(f"body_{number}" for number in range(len(tools)))
        more = "" if only_one else ' ("\\n" call)*'
        return cls("calls", f"start: call{more}\ncall: opening ({any_body}) closing\n{rules}")


class Grammars:
    """Compiles grammars for one model. `stop_ids`: the tokens that end an answer; V: the size of the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, tuple(stop_ids)
        self._lock = threading.Lock()
        self._prepared: Any = None

    def compiled(self, guide: Guide, is_in_thought: bool) -> "Compiled":
        """The grammar of `guide`. `is_in_thought`: the prompt ends inside a thought. Raises UserError for a grammar
        that is wrong or has what llguidance does not know, with its reason, and where llguidance is not installed.
        """
        llguidance = _library()
        with self._lock:  # made once, by the first that needs it
            if self._prepared is None:
                self._prepared = self._tokens(llguidance)
        text = self._grammar(llguidance, guide)
        if len(text) > MAX_BYTES:
            raise UserError(f"the grammar has {len(text)} characters, at most {MAX_BYTES} are taken.")
        matcher = llguidance.LLMatcher(self._prepared, text, log_level=0)
        first = matcher.deep_copy()
        first.compute_bitmask()  # a grammar of which no text can begin shows only here
        for tried in (matcher, first):
            if tried.is_error():
                raise UserError(_refusal(tried.get_error()))
        closes = None
        if is_in_thought:
            closes = self._tokenizer.find_id(CLOSE)
            if closes is None:
                raise UserError(f"the model thinks, and its vocabulary has no token {CLOSE}; switch thinking off.")
        return Compiled(matcher, self._vocab_size, self._stop_ids, closes)

    def _tokens(self, llguidance: Any) -> Any:
        described = self._tokenizer.described()
        if isinstance(described, str):
            # With the file alone it spells text that a grammar demands with special tokens, which it then refuses.
            whole = llguidance.LLTokenizer(described, eos_token=list(self._stop_ids))
            described = [whole.decode_bytes([number]) for number in range(self._tokenizer.vocab_size)]
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, described, self._stop_ids[0]))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=list(self._stop_ids))

    def _grammar(self, llguidance: Any, guide: Guide) -> str:
        make = llguidance.LLMatcher
        try:
            if guide.kind == "json":
                return make.grammar_from_json_schema(_tagged(guide.what), overrides=_JSON)
            if guide.kind == "regex":
                return make.grammar_from_regex(guide.what)
            if guide.kind == "choice":
                return make.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in guide.what))
            grammar = guide.what
            if guide.kind == "calls":
                opening, closing = self._tag(tool_calls.OPEN), self._tag(tool_calls.CLOSE)
                grammar += f'opening: {opening} "\\n"\nclosing: "\\n" {closing}\n'
            return make.grammar_from_lark(grammar)
        except ValueError as error:
            raise UserError(_refusal(str(error))) from None

    def _tag(self, tag: str) -> str:
        """A tag in a grammar: one special token where the vocabulary has it, else its letters."""
        number = self._tokenizer.find_id(tag)
        return tag if number is not None and self._prepared.is_special_token(number) else json.dumps(tag)


@dataclass(frozen=True)
class Compiled:
    """A grammar that is ready; each answer has a state of its own."""

    matcher: Any
    vocab_size: int
    stop_ids: tuple[int, ...]
    closes_thought: int | None

    def state(self) -> "GrammarState":
        """The constraint of one answer."""
        return GrammarState(self.matcher.deep_copy(), self.vocab_size, self.stop_ids, self.closes_thought)


@dataclass(eq=False)
class GrammarState:
    """The constraint of one answer (see generation.request.Constraint), which follows the answer as it grows. `error`:
    why the grammar could not be followed further, so that the answer ended; empty: it could.
    """

    matcher: Any
    vocab_size: int
    stop_ids: tuple[int, ...]
    closes_thought: int | None
    error: str = ""
    _num_read: int = field(default=0, init=False)

    def __call__(self, ids: Sequence[int]) -> np.ndarray | None:
        """The tokens [V] that may follow the answer `ids`; None: all may."""
        while self.closes_thought is not None and self._num_read < len(ids):
            if ids[self._num_read] == self.closes_thought:
                self.closes_thought = None
            self._num_read += 1
        if self.closes_thought is not None:
            return None
        if self._num_read < len(ids):
            self.matcher.consume_tokens(list(ids[self._num_read :]))
            self._num_read = len(ids)
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool)
        if self.matcher.is_error():  # a bound of llguidance
            self.error = self.matcher.get_error().partition(_STATE)[0].strip()[:500] or "it is too complex"
            mask[:] = False
            mask[list(self.stop_ids)] = True
        return mask


def grammar_error(request: Request) -> str:
    """The error of an answer that could not follow its grammar further; empty: it could, or has none."""
    problem = request.constraint.error if isinstance(request.constraint, GrammarState) else ""
    return f"the answer cannot follow its grammar further: {problem}" if problem else ""


def _tagged(schema: Any) -> Any:
    """A schema whose alternatives by `oneOf` hold their `discriminator`, which pydantic leaves out of `required` where
    it has a default: without it nothing says which of them an object is, and readers refuse the object.
    """
    if isinstance(schema, list):
        return [_tagged(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tagged = {key: _tagged(value) for key, value in schema.items()}
    discriminator, branches = schema.get("discriminator"), tagged.get("oneOf")
    tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if isinstance(tag, str) and isinstance(branches, list) and all(isinstance(branch, dict) for branch in branches):
        tagged["oneOf"] = [{"allOf": [branch, {"required": [tag]}]} for branch in branches]
    return tagged


def _refusal(reason: str) -> str:
    """Why a grammar is refused, in llguidance's words, and what to do where a schema has what it does not know."""
    refusal = f"the grammar cannot be used: {reason.partition(_STATE)[0].strip()[:500]}"
    if "coerce_one_of" in reason:
        return "the grammar cannot be used: alternatives of oneOf may hold at the same time. Write anyOf."
    if "Unknown format" in reason:
        return f"{refusal}. The formats of texts are {_FORMATS}; leave another one out, or write it as a pattern."
    return f"{refusal}. Leave them out of the schema." if "Unimplemented keys" in reason else refusal


class _Vocabulary:
    """What llguidance's TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes], eos_token_id: int) -> None:
        self.eos_token_id, self.tokens = eos_token_id, list(tokens)
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text)


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise UserError("answers in a given form need llguidance: pip install 'erniekit[guided]'.") from None
    return llguidance
