"""Compares mathematical answers by math-verify, which parses LaTeX and compares by SymPy."""

import logging
import re
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.numbers import as_typed, number_of, states
from erniekit.rewards.right_answer import AT_END, compatible, final_answer, right_answers, with_minus_signs
from erniekit.rewards.sample import Sample

_LONGEST = 20_000  # characters at the end of an answer that are read
_FORMULA = 200  # characters of a final answer that may be one formula
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u4e00-\u9fff]")
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;! ](?=\d{3}(?!\d))")  # 1\,000, which it reads as 1 times 0
_BESIDE_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])(?=[-\d.])|(?<=\d)(?=[\u4e00-\u9fff])")  # it needs a space there
_COMMAND = re.compile(r"\\[A-Za-z]")


def math(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if math-verify finds the answer equal to one of the record's, else 0.0. The right answer is read as a formula
    with or without dollar signs; it comes first, since the comparison is not symmetric. math-verify finds some number
    in any sentence ("not 5", "3 hours 20 minutes"), so that an answer with words is compared with a number as by
    `accuracy`.

    Raises ValueError if the right answer cannot be read.
    """
    import math_verify

    # It warns at every call that it has no time limits: they work by a signal and may never end a loop in C, so this
    # process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text = with_minus_signs(_THIN_SPACE.sub("", compatible(sample.answer[-_LONGEST:])))
    text = _BESIDE_CHINESE.sub(" ", text)
    found = _formulas_of(text)
    typed = as_typed(final_answer(text))
    has_words = "\\" not in typed and bool(_WORDS.search(typed))
    for right in map(compatible, right_answers(sample, cfg)):
        value = number_of(right) if has_words else None
        if value is not None:
            if states(sample.answer, value):
                return 1.0
            continue
        gold = _parsed(right if "$" in right or "\\boxed" in right else f"${right}$") or _parsed(right)
        if not gold:
            raise ValueError(f"math-verify cannot read {cfg.answer_key!r} of the record: {right[:60]!r}")
        if any(answer and math_verify.verify(gold, answer, timeout_seconds=None) for answer in found):
            return 1.0
    return 0.0


def _formulas_of(text: str) -> list[list[Any]]:
    """What math-verify reads in an answer, and in the final answer alone."""
    found, final = [_parsed(text)], final_answer(text).rstrip(AT_END)
    if "$" in text or not 0 < len(final) < _FORMULA:
        return found
    # It reads LaTeX between dollar signs alone (without them 2\\pi is 2), and no Chinese words before an answer.
    stated = _parsed(f"${final}$")
    is_formula = stated and _COMMAND.search(final) and not _WORDS.search(final)
    return [stated] if is_formula else [*found, stated]


def _parsed(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return list(parse(text, configs, parsing_timeout=None))
