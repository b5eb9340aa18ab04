"""Converts records of preference data to Samples of kind "pair": a prompt, a chosen and a rejected answer.

erniekit: {"src": [...], "tgt": [...], "response": [[...], [...]], "sort": [1, 0]}: n user turns, the n - 1 answers
before the last, two responses, each a string or a list that alternates assistant, user, ..., assistant; the higher
`sort` is chosen. messages and sharegpt: the conversation so far in the type's usual field (or `prompt`) and two
answers, each a message, a list of them, or its text; without the conversation, or where it only repeats what they
have, `chosen` and `rejected` are whole conversations that begin alike; without `chosen`, the conversation ends with it.
alpaca: `question` or `instruction` (with input and history), `chosen`, `rejected`. All but erniekit may have a
`margin`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, has_content
from erniekit.data.records.sample import (
    Format,
    Sample,
    TurnReader,
    alpaca_prompt,
    check_order,
    sharegpt_keys,
    system_messages,
    turn_of,
    turns_of,
)
from erniekit.data.records.tool_calls import match_calls, tools_of
from erniekit.data.records.values import kind_of, list_of, one_of, text_of, texts_of
from erniekit.utils.wording import count_of

Turns = list[dict[str, Any]]
_SAME = ("both answers are the same", "a pair needs a better and a worse answer; remove the record")
MARGIN = "margin"
_MAX_SCORE = 1e30  # the largest score: differences are stored in float32


def _pair(
    prompt: Turns, chosen: Turns, rejected: Turns, notes: Notes, score_delta: float | None, tools: Any = None
) -> Sample:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        check_order(prompt + answer, f"prompt + {name}")
        if answer[0]["role"] != "assistant":
            raise BadRecord(f"the {name} answer begins with the role {answer[0]['role']!r}", "begin it with assistant")
    first = match_calls(prompt + chosen, tools, "prompt + chosen", notes)
    second = match_calls(prompt + rejected, tools, "prompt + rejected", notes)
    prompt, chosen, rejected = first[: len(prompt)], first[len(prompt) :], second[len(prompt) :]
    if chosen == rejected:  # the answers may have become equal, as if they differed only in the order of tool results
        raise BadRecord(*_SAME)
    return Sample(prompt, tools=tools, kind="pair", answers=(chosen, rejected), score_delta=score_delta)


def _erniekit(record: dict[str, Any], notes: Notes) -> Sample:
    questions = texts_of(record, "src")
    earlier = texts_of(record, "tgt") if record.get("tgt") else []
    if len(earlier) != len(questions) - 1:
        raise BadRecord(
            f"'src' has {count_of(len(questions), 'turn')} and 'tgt' has {len(earlier)}",
            "tgt holds the earlier answers, one less than src; the last question's two answers are the response",
        )
    prompt = system_messages(record)
    for i, question in enumerate(questions):
        prompt.append({"role": "user", "content": text_of(question, f"src[{i}]")})
        if i < len(earlier):
            prompt.append({"role": "assistant", "content": text_of(earlier[i], f"tgt[{i}]")})
    responses, sort = list_of(record, "response"), list_of(record, "sort")
    if len(responses) != 2:
        raise BadRecord(
            f"'response' has {count_of(len(responses), 'entry', 'entries')}",
            "give exactly two, a better and a worse one",
        )
    if len(sort) != 2 or any(type(x) not in (int, float) or not abs(x) < _MAX_SCORE for x in sort):
        shown = str(sort) if len(str(sort)) <= 60 else "two others"
        raise BadRecord(f"'sort' must be two numbers, not {shown}", "give one for each response; the higher is chosen")
    if abs(sort[0] - sort[1]) < 1 / _MAX_SCORE:
        raise BadRecord(f"'sort' is {sort!r}: neither response is better", "give different numbers, or remove it")
    turns = [_alternating(response, f"response[{i}]") for i, response in enumerate(responses)]
    best = 0 if sort[0] > sort[1] else 1
    return _pair(prompt, turns[best], turns[1 - best], notes, score_delta=float(abs(sort[0] - sort[1])))


def _margin(record: dict[str, Any]) -> float | None:
    """How much better the chosen answer is, in TRL's field `margin`. None for anything but a number from 0 on, which is
    no fault of the record: whether a key reads it is not known here (dataset.Source).
    """
    value = record.get(MARGIN)
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        return None
    return number if 0 <= number < _MAX_SCORE else None


def _alternating(response: Any, name: str) -> Turns:
    texts = response if isinstance(response, list) else [response]
    if len(texts) % 2 == 0:
        raise BadRecord(
            f"{name} has {len(texts)} turns", "assistant, user, ..., assistant: an odd number, beginning and ending so"
        )
    roles = ("assistant", "user")
    return [{"role": roles[i % 2], "content": text_of(text, f"{name}[{i}]")} for i, text in enumerate(texts)]


def _alpaca(record: dict[str, Any], notes: Notes) -> Sample:
    name = one_of(record, "question", "instruction")
    if name is None and ("question" in record and "instruction" in record):
        raise BadRecord("both 'question' and 'instruction' are given", "keep one of them")
    if name is None:
        raise BadRecord("field 'question' is missing", "every alpaca pair needs 'question', 'chosen' and 'rejected'")
    chosen, rejected = (_answer(record, side, ("role", "content"), notes, turn_of) for side in ("chosen", "rejected"))
    return _pair(alpaca_prompt(record, name), chosen, rejected, notes, _margin(record))


def _messages(record: dict[str, Any], notes: Notes) -> Sample:
    return pair_of_messages(record, notes, PLAIN)


def _sharegpt(record: dict[str, Any], notes: Notes) -> Sample:
    return pair_of_sharegpt(record, notes, PLAIN)


class TurnsReader(NamedTuple):
    """How messages are read: one message, and then what is done to all messages of the prompt."""

    read: TurnReader
    finish: Callable[[Turns], Turns]


PLAIN = TurnsReader(turn_of, lambda turns: turns)


def pair_of_messages(record: dict[str, Any], notes: Notes, turns: TurnsReader) -> Sample:
    """The pair of a record of the type `messages`."""
    return _conversations(record, ("messages", "prompt"), [], ("role", "content"), notes, turns)


def pair_of_sharegpt(record: dict[str, Any], notes: Notes, turns: TurnsReader) -> Sample:
    """The pair of a record of the type `sharegpt`."""
    keys = sharegpt_keys(next(filter(None, map(record.get, ("conversations", "chosen"))), None))
    return _conversations(record, ("conversations", "prompt"), system_messages(record), keys, notes, turns)


def _conversations(
    record: dict[str, Any],
    names: tuple[str, str],
    system: Turns,
    keys: tuple[str, str],
    notes: Notes,
    reader: TurnsReader,
) -> Sample:
    tools = tools_of(record, notes)
    fields = [_answer_field(record, side) for side in ("chosen", "rejected")]
    before = {
        name: _turns_before(record, name, keys, notes, reader.read) for name in names if has_content(record.get(name))
    }
    if len(before) == 1 and not has_content(record.get(fields[0])):
        prompt, chosen = _last_answer(*before.values())
        if chosen:
            rejected = _answer(record, fields[1], keys, notes, reader.read)
            return _pair(reader.finish(system + prompt), chosen, rejected, notes, _margin(record), tools)
    chosen, rejected = (_answer(record, field, keys, notes, reader.read) for field in fields)
    if not before or all(answer and answer[0]["role"] in ("system", "user") for answer in (chosen, rejected)):
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
        for name, turns in before.items():
            _require_repeated(name, turns, prompt + chosen)
    elif len(before) > 1:
        raise BadRecord(f"both {names[0]!r} and {names[1]!r} are given", "keep one of them")
    else:
        [prompt] = before.values()
    return _pair(reader.finish(system + prompt), chosen, rejected, notes, _margin(record), tools)


def _answer_field(record: dict[str, Any], side: str) -> str:
    """Which of the two fields that may have the answer of a side has it."""
    given = [name for name in (side, f"{side}_response") if has_content(record.get(name))]
    if len(given) > 1:
        raise BadRecord(f"both {given[0]!r} and {given[1]!r} are given", "keep one of them")
    return given[0] if given else side


def _last_answer(turns: Turns) -> tuple[Turns, Turns]:
    """The turns up to the last question, and what follows it: ms-swift's conversations end with the chosen answer."""
    end = max((i for i, turn in enumerate(turns, 1) if turn["role"] == "user"), default=0)
    return turns[:end], turns[end:]


def _turns_before(
    record: dict[str, Any], name: str, keys: tuple[str, str], notes: Notes, read_turn: TurnReader
) -> Turns:
    """The conversation before the answers, which may be the text of a question alone."""
    value = record[name]
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(value, repr(name))}]
    return turns_of(record, name, keys, notes, read_turn)


def _require_repeated(name: str, turns: Turns, conversation: Turns) -> None:
    """Check that a field says no more than the whole conversation in `chosen`: many data sets have their prompt, or
    `messages` for fine-tuning, beside it.
    """
    if turns != conversation[: len(turns)] and not (len(turns) == 1 and turns[0] in conversation):
        raise BadRecord(
            f"'chosen' and 'rejected' are whole conversations, and {name!r} has turns that 'chosen' does not have",
            "remove it, or leave the turns of the prompt out of 'chosen' and 'rejected'",
        )


def _answer(record: dict[str, Any], name: str, keys: tuple[str, str], notes: Notes, read_turn: TurnReader) -> Turns:
    """Converts an answer, which is a text, a message or a list of messages, to messages."""
    value = record.get(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": text_of(value, repr(name))}]
    if isinstance(value, dict):
        return [read_turn(value, name, keys, notes)]
    if value is not None and not isinstance(value, list):
        raise BadRecord(f"{name!r} must be text or a list of messages, not {kind_of(value)}", "write the answer there")
    return turns_of(record, name, keys, notes, read_turn)


def _common_beginning(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Splits two whole conversations into their common beginning, up to the last question or tool result, and
    the rest of each.
    """
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise BadRecord(*_SAME)
    while same and chosen[same - 1]["role"] not in ("user", "tool"):
        same -= 1
    if not same or same in (len(chosen), len(rejected)):
        raise BadRecord(
            "'chosen' and 'rejected' do not share a question", "begin both with the same turns, or give 'prompt'"
        )
    return chosen[:same], chosen[same:], rejected[same:]


_SIDES = ("chosen", "rejected", "chosen_response", "rejected_response")
# The suffix "(DPO)" distinguishes these types from those of single answers (dataset.read_specs adds it).
PREFERENCE_FORMATS = {
    "erniekit (DPO)": Format(_erniekit, ("src", "tgt", "response", "sort", "system"), ("response",)),
    "alpaca (DPO)": Format(
        _alpaca, ("question", "instruction", "input", "history", "system", "chosen", "rejected"), ("chosen",)
    ),
    "messages (DPO)": Format(_messages, ("messages", "prompt", "tools", *_SIDES), _SIDES),
    "sharegpt (DPO)": Format(_sharegpt, ("conversations", "prompt", "system", "tools", *_SIDES), _SIDES),
}
