"""Parses input_dir: the token files and the weight of each."""

import math
from collections.abc import Sequence
from pathlib import PurePath


def weighted_prefixes(words: Sequence[str]) -> list[tuple[float | None, str]]:
    """("0.4", "a", "0.6", "b") -> (0.4, "a"), (0.6, "b"); prefixes alone have no weight.

    Raises ValueError with a text to put after "input_dir: ".
    """
    if any(word.endswith("::CPT") for word in words):
        raise ValueError("::CPT marks data for self_constraint_cpt, which this version does not have. Remove it")
    if all(_number(word) is None for word in words):
        return [(None, checked_prefix(word)) for word in words]
    pairs: list[tuple[float | None, str]] = [_weighted(*pair) for pair in zip(words[0::2], words[1::2], strict=False)]
    if len(words) % 2:
        raise ValueError(
            f'expected "weight prefix weight prefix ...", or prefixes only, got {" ".join(words)!r}. '
            "Write a weight before every prefix"
        )
    return pairs


def checked_prefix(path: str) -> str:
    """The path, if names can begin with it. Raises ValueError for one that is a directory alone (., .., /)."""
    if PurePath(path).name in ("", "..", ".bin", ".idx"):
        raise ValueError(
            f"{path} is not a prefix: the files are PREFIX.bin and PREFIX.idx. Write one, such as data/part0"
        )
    return path


def _weighted(weight: str, prefix: str) -> tuple[float, str]:
    number = _number(weight)
    if number is None or not 0 < number < math.inf:
        raise ValueError(
            f"the weight of {prefix} must be a number more than 0, got {weight!r}. Write a weight before every prefix, "
            "or before none; to leave a file out, remove it"
        )
    return number, checked_prefix(prefix)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
