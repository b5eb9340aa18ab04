"""Rewards for the form of a completion: what its text is like, whatever is right."""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.generation.thinking import CLOSE, OPEN
from erniekit.rewards.numbers import as_typed
from erniekit.rewards.picture_answers import option_of
from erniekit.rewards.right_answer import final_answer, normalised, right_answers
from erniekit.rewards.sample import Sample, text_of

NGRAM, MAX_REPETITION_PENALTY = 3, -1.0  # the values of arXiv 2502.03373, appendix
RANGE_WRONG, RANGE_RIGHT = (-1.0, -0.5), (0.5, 1.0)
_WORDS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\d_\u3400-\u4dbf\u4e00-\u9fff]+|\d+")
_CHINESE, _LATIN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile(r"[A-Za-zÀ-ɏ]+")
# Kana, Hangul and words of other scripts; Greek letters are signs of formulas.
_OTHER = re.compile(
    r"[\u3040-\u30ff\uac00-\ud7af]|[^\W\d_A-Za-zÀ-ɏ\u0370-\u03ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)
# Code, formulas and tags are in no language.
_NO_LANGUAGE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[A-Za-z]+|</?[A-Za-z_]+>", re.DOTALL)
_LETTERS = re.compile(r"[A-H](?:\s*[,，、;；&/+]?\s*(?:and|or|和|与|或)?\s*[A-H])*")
_AROUND_LETTERS = re.compile(r"[()\[\].。*]")
_CHOSEN = re.compile(r"选[择项]?\s*[是为:：]?")
_FENCE = re.compile(r"^\s*```[A-Za-z0-9]*\s*\n?|\s*```\s*$")


def exact(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the answer, or its last \\boxed{}, is the record's text (right_answer.normalised), else 0.0."""
    given = {normalised(sample.answer), normalised(final_answer(sample.answer)) if "\\boxed" in sample.answer else ""}
    return float(any(normalised(right) in given for right in right_answers(sample, cfg)))


def choice(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the chosen letters, A to H, are the record's, else 0.0; several letters are compared as a set.

    Raises ValueError if the record's answer is none of these letters.
    """
    right, final = right_letters(sample, cfg), as_typed(final_answer(sample.answer))
    chosen = _letters(_CHOSEN.split(final)[-1])
    if len(right) == 1 and len(chosen) < 2:
        return float(option_of(sample.answer) in right)
    return float(chosen == right)


def right_letters(sample: Sample, cfg: RewardArgs) -> set[str]:
    """The letters that are right. Raises ValueError if the record's answer is none from A to H."""
    right = _letters("".join(right_answers(sample, cfg)).strip())
    if not right:
        raise ValueError(
            f"{cfg.answer_key!r} of the record is not a letter from A to H: {sample.fields[cfg.answer_key]!r}"
        )
    return right


def _letters(text: str) -> set[str]:
    text = _AROUND_LETTERS.sub(" ", unicodedata.normalize("NFKC", text)).strip()
    match = _LETTERS.fullmatch(text)
    return set(re.findall("[A-H]", text)) if match else set()


def thinking_format(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the completion is one thought in <think> and </think>, with an answer behind it, else 0.0. Where the
    prompt opens the thought, the completion closes it.
    """
    text = sample.completion.strip()
    opened = not sample.opened_thought
    begins = text.startswith(OPEN) if opened else True
    whole = begins and text.count(OPEN) == int(opened) and text.count(CLOSE) == 1
    return float(bool(whole and sample.answer.strip()))


def json_schema(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the answer is JSON, also in a code block, that fits the record's `json_schema`, else 0.0."""
    schema, validator = right_schema(sample, cfg)
    try:
        value = json.loads(_FENCE.sub("", sample.answer), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(validator(schema).is_valid(value))


def right_schema(sample: Sample, cfg: RewardArgs) -> tuple[Any, Any]:
    """(the record's `json_schema`, the class of jsonschema that validates by it). Raises ValueError for what is no
    schema.
    """
    schema = sample.fields.get("json_schema")
    return _checked_schema(schema if isinstance(schema, str) else json.dumps(schema))


@lru_cache(maxsize=256)  # records share schemas
def _checked_schema(text: str) -> tuple[Any, Any]:
    import jsonschema

    schema = json.loads(text)
    if not isinstance(schema, Mapping | bool):
        raise ValueError("the record has no 'json_schema' that is an object")
    validator: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"'json_schema' of the record is not a valid JSON schema: {error.message[:200]}") from None
    return schema, validator


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def length(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the number of tokens is within the limits of the configuration, else 0.0."""
    return float(cfg.reward_min_length <= len(sample.completion_ids) <= cfg.reward_max_length)


def cosine(num_tokens: int, is_right: bool, max_length: int) -> float:
    """The reward of a length (Yeo et al. 2025, arXiv 2502.03373, equation 1): from 1 for a short to 0.5 for a long
    right answer, and from -1 for a short to -0.5 for a long wrong one, along half a period of the cosine.
    """
    share = min(num_tokens / max_length, 1.0)
    worst, best = RANGE_RIGHT if is_right else RANGE_WRONG[::-1]
    return worst + (best - worst) * (1 + math.cos(share * math.pi)) / 2


def repetition(sample: Sample, cfg: RewardArgs) -> float:
    """-1 times the share of sequences of three words that occurred before (arXiv 2502.03373). A Chinese character is a
    word, and case does not count.
    """
    words = _WORDS.findall(sample.completion.lower())
    count = len(words) - NGRAM + 1
    if count < 1:
        return 0.0
    different = len(set(zip(*(words[start:] for start in range(NGRAM)), strict=False)))
    return (1 - different / count) * MAX_REPETITION_PENALTY


def language(sample: Sample, cfg: RewardArgs) -> float | None:
    """The share of words that are in the wanted language, a Chinese character counting as one; words in other scripts
    are in another language, and code, formulas and tags do not count. 1.0 without any word; None if the prompt is to
    decide and has none in either language.
    """
    wanted = cfg.reward_language
    if wanted == "prompt":
        text = " ".join(text_of(message.get("content")) for message in sample.prompt if message["role"] == "user")
        chinese, latin, _ = _counts(text)
        if not chinese + latin:
            return None
        wanted = "zh" if chinese >= latin else "en"
    chinese, latin, other = _counts(sample.completion)
    total = chinese + latin + other
    return (chinese if wanted == "zh" else latin) / total if total else 1.0


def _counts(text: str) -> tuple[int, int, int]:
    """Chinese characters, words in Latin letters, words in other scripts."""
    text = _NO_LANGUAGE.sub(" ", text)
    return len(_CHINESE.findall(text)), len(_LATIN.findall(text)), len(_OTHER.findall(text))
