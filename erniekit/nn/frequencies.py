"""The frequencies of rotary positions, and how a model's config.json scales them for longer texts. numpy only.

All of it is as transformers computes it (modeling_rope_utils): `linear` divides frequencies by a factor (Chen et al.
2023, arXiv 2306.15595), `yarn` only those that turn less than once in the original length, and multiplies queries and
keys (Peng et al. 2023, arXiv 2309.00071), `dynamic` raises the base with the length of a text beyond the original one.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """`kind` and its numbers; `length` is the number of positions without scaling. `attention_factor`: what queries and
    keys are multiplied by. `given`: the keys of config.json, to be written again.
    """

    kind: Literal["linear", "dynamic", "yarn"]
    factor: float
    length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    given: tuple[tuple[str, float | int | bool | str], ...] = ()


@lru_cache(maxsize=8)
def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2j/head_dim) for j = 0, 1, ...: fp32 [head_dim/2], rounded as transformers and Paddle round it: the
    exponent, the power and its reciprocal are fp32 each. Published models were trained with these numbers; the last
    bit of a frequency moves an angle by 0.005 at position 100,000.
    """
    frequencies = np.float32(1.0) / _powers(head_dim, np.float64(np.float32(theta)))
    frequencies.setflags(write=False)  # all callers share the array
    return frequencies


def _powers(head_dim: int, theta: np.ndarray | np.float64) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # numpy's own fp32 power is off by a bit now and then, and differs between processors.
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def scaled_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, positions: np.ndarray, row: int | None = None
) -> np.ndarray:
    """The frequencies of a model: fp32 [head_dim/2], or of `dynamic` scaling [T, head_dim/2], for tokens at `positions`
    [T]. With `dynamic` scaling a text is a span of consecutive positions, and its length is its last position + 1; it
    ends after every `row` tokens.
    """
    if scaling is None:
        return inverse_frequencies(head_dim, theta)
    if scaling.kind == "linear":
        return inverse_frequencies(head_dim, theta) / np.float32(scaling.factor)
    if scaling.kind == "yarn":
        return _yarn(head_dim, theta, scaling)
    lengths = np.maximum(_text_lengths(positions, row), scaling.length)
    grown = scaling.factor * lengths / scaling.length - (scaling.factor - 1)
    bases = (theta * grown ** (head_dim / (head_dim - 2))).astype(np.float32)
    distinct, which = np.unique(bases, return_inverse=True)
    return (np.float32(1.0) / _powers(head_dim, distinct.astype(np.float64)[:, None]))[which]


def _text_lengths(positions: np.ndarray, row: int | None) -> np.ndarray:
    """The last position + 1 of the span of consecutive positions that each token is in: [T]."""
    is_first = np.diff(positions, prepend=np.int64(-2)) != 1
    is_first[:: row or len(positions) or 1] = True
    begins = np.flatnonzero(is_first)
    ends = np.append(begins[1:], len(positions))
    return np.repeat(positions[ends - 1] + 1, ends - begins) if len(positions) else np.zeros(0)


def _yarn(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Section 3.2: frequencies that turn more than beta_fast times in the original length stay, those below beta_slow
    are divided by the factor, and in between both are mixed.
    """

    def index_of(rotations: float) -> float:
        """The (fractional) index of the frequency that turns so often."""
        return head_dim * math.log(scaling.length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    divided = np.clip(ramp, 0, 1)
    plain = inverse_frequencies(head_dim, theta)
    slow = np.float32(1.0) / (np.float32(scaling.factor) * _powers(head_dim, np.float64(np.float32(theta))))
    return slow * divided + plain * (1 - divided)
