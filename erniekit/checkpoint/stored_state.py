"""Reads tensors of a training state from disk, each whole or in pieces that several ranks wrote."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from erniekit.checkpoint.safetensors_header import TensorInfo
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.weights import Shape
from erniekit.utils.errors import CheckpointError

_ROWS = re.compile(r"(.+)\[([0-9]{1,18}):([0-9]{1,18})\]")


def piece_name(name: str, rows: tuple[int, int] | None) -> str:
    """The name in files of rows [begin, end) of a tensor; None: of the whole tensor."""
    return name if rows is None else f"{name}[{rows[0]}:{rows[1]}]"


class StoredState:
    """Tensors on disk, some of them in several pieces "name[begin:end]" along their first axis."""

    def __init__(self, directory: Path, dtypes: Sequence[str] = ("F32",)) -> None:
        """CheckpointError if a tensor has none of the header types `dtypes`, or if the pieces of one do not make a
        whole.
        """
        self.reader = Reader(directory)
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for stored in self.reader.keys():  # noqa: SIM118 no mapping
            match = _ROWS.fullmatch(stored)
            if self.reader.info(stored).dtype not in dtypes:
                raise CheckpointError(
                    f"{directory}: {stored} is {self.reader.info(stored).dtype}, not {' or '.join(dtypes)}. Resume "
                    "from an older checkpoint."
                )
            if match:
                self._pieces.setdefault(match[1], []).append((int(match[2]), int(match[3]), stored))
        for name, pieces in self._pieces.items():
            pieces.sort()
            ends = [0, *(end for _, end, _ in pieces)]
            infos = [self.reader.info(stored) for _, _, stored in pieces]
            rows = [TensorInfo(infos[0].dtype, (end - begin, *infos[0].shape[1:])) for begin, end, _ in pieces]
            if [begin for begin, _, _ in pieces] != ends[:-1] or infos != rows or name in self.reader:
                raise CheckpointError(
                    f"{directory}: the pieces of {name} leave gaps or overlap: {', '.join(p[2] for p in pieces)}. "
                    "Resume from an older checkpoint."
                )

    def keys(self) -> list[str]:
        """The names of the whole tensors."""
        return list(dict.fromkeys(match[1] if (match := _ROWS.fullmatch(n)) else n for n in self.reader.keys()))  # noqa: SIM118

    def info(self, name: str) -> TensorInfo:
        """(header dtype, shape) of the whole tensor."""
        pieces = self._pieces.get(name)
        if pieces is None:
            return self.reader.info(name)
        first = self.reader.info(pieces[0][2])
        return TensorInfo(first.dtype, (pieces[-1][1], *first.shape[1:]))

    def shape(self, name: str) -> Shape:
        """The shape of the whole tensor."""
        return self.info(name).shape

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor, or rows [begin, end) of its first axis; no other rows are read."""
        pieces = self._pieces.get(name)
        if pieces is None:
            return self.reader.read(name, rows=rows)
        first, last = rows or (0, pieces[-1][1])
        parts = [
            self.reader.read(stored, rows=(max(first, begin) - begin, min(last, end) - begin))
            for begin, end, stored in pieces
            if begin < last and end > first
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
