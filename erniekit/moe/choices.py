"""The experts that tokens are sent to, as a table that outlives a pass: a pass of generation records its choices, and a
pass of training gets them (routing replay, arXiv 2510.11370, section 3).

Legend: T tokens, S sparse layers, K experts of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def table_dtype(num_experts: int) -> type[np.unsignedinteger]:
    """The smallest type that holds the numbers of this many experts."""
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True)
class RecordedChoices:
    """The experts of a pass's T tokens in all sparse layers of the model: `table` uint8 or uint16 [T, S, K], of the
    layers with these numbers. `replays`: tokens are sent to them; otherwise they are only compared with what the
    routers choose.
    """

    table: np.ndarray
    layers: tuple[int, ...]
    replays: bool = True

    def of(self, layer: int, tokens: np.ndarray | None) -> np.ndarray:
        """The experts that a layer chose for the tokens with these numbers (None: for all), int64 [n, K]."""
        column = self.table[:, self.layers.index(layer)]
        return (column if tokens is None else column[tokens]).astype(np.int64)


def num_changed(one_TK: np.ndarray, other_TK: np.ndarray) -> int:
    """The number of tokens that two choices send to different sets of experts."""
    return int((np.sort(one_TK, axis=1) != np.sort(other_TK, axis=1)).any(axis=1).sum())


def table_bytes(num_tokens: int, num_layers: int, top_k: int, num_experts: int) -> int:
    """The memory of a table."""
    return num_tokens * num_layers * top_k * np.dtype(table_dtype(num_experts)).itemsize


def empty_table(num_layers: int, top_k: int, num_experts: int) -> np.ndarray:
    """A table of no tokens."""
    return np.zeros((0, num_layers, top_k), table_dtype(num_experts))


def join_layers(tables: Sequence[np.ndarray], layers: Sequence[Sequence[int]]) -> np.ndarray:
    """One table [T, S, K] of those of several pipeline stages, whose columns are the layers with these numbers."""
    order = np.argsort([number for numbers in layers for number in numbers], kind="stable")
    return np.concatenate(tables, axis=1)[:, order]
