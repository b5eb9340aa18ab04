"""Compares mathematical answers by math-verify, which parses LaTeX and compares by SymPy."""

import logging
import re

from erniekit.config.schema_rewards import RewardArgs
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
    with or without dollar signs; it comes first, since the comparison is not symmetric.

    Raises ValueError if the right answer cannot be read.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # It warns at every call that it has no time limits: they work by a signal and may never end a loop in C, so this
    # process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    text = with_minus_signs(_THIN_SPACE.sub("", compatible(sample.answer[-_LONGEST:])))
    text = _BESIDE_CHINESE.sub(" ", text)
    found = [parse(text, configs, parsing_timeout=None)]
    final = final_answer(text).rstrip(AT_END)
    if "$" not in text and 0 < len(final) < _FORMULA:
        # It reads LaTeX between dollar signs alone (without them 2\\pi is 2), and no Chinese words before an answer.
        stated = parse(f"${final}$", configs, parsing_timeout=None)
        is_formula = stated and _COMMAND.search(final) and not _WORDS.search(final)
        found = [stated] if is_formula else [*found, stated]
    for right in map(compatible, right_answers(sample, cfg)):
        gold = parse(right if "$" in right or "\\boxed" in right else f"${right}$", configs, parsing_timeout=None)
        gold = gold or parse(right, configs, parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot read {cfg.answer_key!r} of the record: {right[:60]!r}")
        if any(answer and verify(gold, answer, timeout_seconds=None) for answer in found):
            return 1.0
    return 0.0
