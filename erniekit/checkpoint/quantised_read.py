"""Opens directories of quantised weights as if they held the weights that the codes stand for, in fp32.

The tensors beside a quantised matrix say how it is stored; what config.json says of it has to agree. Everything that is
not part of a quantised matrix is read as it is, so a scale without its codes is an unexpected tensor of the model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import FLOATS
from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.quantised_codecs import Codec, PackQuantized
from erniekit.checkpoint.safetensors_header import TensorInfo
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.config import CONFIG_FILE
from erniekit.models.config_keys import QUANTISED
from erniekit.precision.codes import full_range
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix of a directory: `name` without `.weight`, `shape` [out, in], and its codec."""

    name: str
    shape: tuple[int, int]
    codec: Codec


class QuantisedReader:
    """The tensors of a directory of quantised weights; each quantised matrix is one fp32 tensor. See Reader."""

    def __init__(self, reader: Reader, matrices: Iterable[StoredMatrix], description: str) -> None:
        """`description`: the method, for messages."""
        self.path, self.metadata, self.description = reader.path, reader.metadata, description
        self._reader = reader
        self._matrices = {f"{matrix.name}.weight": matrix for matrix in matrices}
        plans = [matrix.codec.plan(matrix.name, matrix.shape) for matrix in self._matrices.values()]
        parts = {name for plan in plans for name, _, _ in plan}
        self._plain = [name for name in reader.keys() if name not in parts]  # noqa: SIM118 - a Reader is not iterable

    def keys(self) -> list[str]:
        """See Reader."""
        return [*self._plain, *self._matrices]

    def __contains__(self, name: str) -> bool:
        return name in self._matrices or name in self._plain

    def info(self, name: str) -> TensorInfo:
        """See Reader."""
        matrix = self._matrices.get(name)
        return self._reader.info(name) if matrix is None else TensorInfo("F32", matrix.shape)

    def read(self, name: str, as_fp32: bool = False) -> np.ndarray:
        """See Reader. A quantised matrix has its whole fp32 size."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._reader.read(name, as_fp32)
        return matrix.codec.weight(self._read_part, matrix.name, matrix.shape)

    def _read_part(self, name: str) -> np.ndarray:
        return self._reader.read(name, as_fp32=self._reader.info(name).dtype in FLOATS)


def open_weights(path: Path) -> Reader | QuantisedReader:
    """The tensors of a model directory, quantised or not. Raises CheckpointError: quantised by a method that is not
    read here, or with tensors that do not belong together (all of them are named).
    """
    reader = Reader(path, u16_is_bf16=True)
    settings = quantisation_of(path)
    if not settings:
        return reader
    method = settings.get("quant_method", settings.get("quantization"))
    recognise = _METHODS.get(method) if isinstance(method, str) else None
    if recognise is None:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: quantization_config: weights of the method {method!r:.60} are not read here, only "
            f"{', '.join(_METHODS)}. Use the bfloat16 checkpoint of the model."
        )
    problems: list[str] = []
    matrices = list(recognise(reader, settings, problems))
    if not matrices and not problems:
        problems.append(f"{CONFIG_FILE} says that the weights are quantised ({method}), and no tensor is")
    if problems:
        raise CheckpointError(
            f"{path}: the quantised weights are incomplete or of another format: {listed(problems)}. Copy the "
            "directory again from where it was quantised."
        )
    return QuantisedReader(reader, matrices, str(method))


def quantisation_of(path: Path) -> dict[str, Any]:
    """What config.json of a model directory says about quantised weights; empty if nothing."""
    try:
        values = read_json_object(path / CONFIG_FILE, CheckpointError)
    except FileNotFoundError:
        return {}
    for key in QUANTISED:
        value = values.get(key)
        if value:
            return dict(value) if isinstance(value, Mapping) else {"quant_method": value}
    return {}


_ENDING = re.compile(r"\.weight(_packed|_scale|_shape|_zero_point|_g_idx)$")


def _compressed_tensors(reader: Reader, settings: Mapping[str, Any], problems: list[str]) -> Iterable[StoredMatrix]:
    """The matrices of a file of compressed-tensors."""
    for name in reader.keys():  # noqa: SIM118 - a Reader is not iterable
        if name.endswith(".weight_packed"):
            matrix = _packed(reader, name.removesuffix(".weight_packed"), problems)
            if matrix is not None:
                yield matrix


def _packed(reader: Reader, name: str, problems: list[str]) -> StoredMatrix | None:
    needed = [f"{name}.weight_{part}" for part in ("scale", "shape")]
    missing = [part for part in needed if part not in reader]
    if missing:
        problems.append(f"{', '.join(missing)} missing")
        return None
    if reader.info(needed[1]).shape != (2,):
        problems.append(f"{needed[1]} is not two numbers")
        return None
    num_out, num_in = (int(size) for size in reader.read(needed[1]))
    words, scales = reader.info(f"{name}.weight_packed").shape, reader.info(needed[0]).shape
    bits = next((bits for bits in (4, 8) if words == (num_out, -(-num_in * bits // 32))), None)
    if bits is None or len(scales) != 2 or scales[0] != num_out or not scales[1] or num_in % scales[1]:
        problems.append(
            f"{name}: weight_packed {list(words)} and weight_scale {list(scales)} do not fit weight_shape "
            f"[{num_out}, {num_in}] in 4 or 8 bits"
        )
        return None
    group = None if scales[1] == 1 else num_in // scales[1]
    return StoredMatrix(
        name, (num_out, num_in), PackQuantized(full_range(bits, group), f"{name}.weight_zero_point" in reader)
    )


_METHODS = {"compressed-tensors": _compressed_tensors}
