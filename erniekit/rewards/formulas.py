"""Compares mathematical answers by math-verify, which parses LaTeX and compares by SymPy."""

import logging

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.right_answer import right_answers
from erniekit.rewards.sample import Sample

_LONGEST = 20_000  # characters at the end of an answer that are read


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
    # The minus sign, U+2212, is none for it.
    found = parse(sample.answer[-_LONGEST:].replace("\u2212", "-"), configs, parsing_timeout=None)
    for right in (text.replace("\u2212", "-") for text in right_answers(sample, cfg)):
        gold = parse(right if "$" in right or "\\boxed" in right else f"${right}$", configs, parsing_timeout=None)
        gold = gold or parse(right, configs, parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot read {cfg.answer_key!r} of the record: {right[:60]!r}")
        if found and verify(gold, found, timeout_seconds=None):
            return 1.0
    return 0.0
