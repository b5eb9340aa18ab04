"""Opens directories of quantised weights as if they held the weights that the codes stand for, in fp32.

What is not part of a quantised matrix is read as it is, so a scale without its codes is an unexpected tensor of the
model, and one that is missing an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import FLOATS
from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.quantised_codecs import Codec
from erniekit.checkpoint.quantised_recognise import METHODS, Recognised
from erniekit.checkpoint.safetensors_header import TensorInfo
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.config import CONFIG_FILE
from erniekit.models.config_keys import QUANTISED
from erniekit.utils import log
from erniekit.utils.arrays import transposed
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object
from erniekit.utils.wording import count_of


class QuantisedReader:
    """The tensors of a directory of quantised weights; each quantised matrix is one fp32 tensor. See Reader."""

    def __init__(self, reader: Reader, found: Recognised, description: str) -> None:
        """`description`: the method, for messages. `stored` is `reader`: codes and scales as they lie in the files."""
        self.path, self.metadata, self.description = reader.path, reader.metadata, description
        self.stored = reader
        self._matrices = {f"{matrix.name}.weight": matrix for matrix in found.matrices}
        plans = [matrix.codec.plan(matrix.name, matrix.shape) for matrix in found.matrices]
        hidden = {name for plan in plans for name, _, _ in plan}.union(*found.left_out.values())
        self._plain = {name: None for name in reader.keys() if name not in hidden}  # noqa: SIM118 - it is not iterable

    def codec_of(self, name: str) -> Codec | None:
        """How the matrix `name`, with its ending, is quantised; None if it is not."""
        matrix = self._matrices.get(name)
        return None if matrix is None else matrix.codec

    def keys(self) -> list[str]:
        """See Reader."""
        return [*self._plain, *self._matrices]

    def __contains__(self, name: str) -> bool:
        return name in self._matrices or name in self._plain

    def info(self, name: str) -> TensorInfo:
        """See Reader."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self.stored.info(name)
        return TensorInfo("F32", matrix.shape[::-1] if matrix.codec.is_transposed else matrix.shape)

    def read(self, name: str, as_fp32: bool = False) -> np.ndarray:
        """See Reader. A quantised matrix has its whole fp32 size."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self.stored.read(name, as_fp32)
        weight = matrix.codec.weight(self._read_part, matrix.name, matrix.shape)
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{self.path}: {matrix.name}: a code or a scale is not finite. Quantise it again.")
        return transposed(weight) if matrix.codec.is_transposed else weight

    def _read_part(self, name: str) -> np.ndarray:
        return self.stored.read(name, as_fp32=self.stored.info(name).dtype in FLOATS)


def open_weights(path: Path, say: bool = True) -> Reader | QuantisedReader:
    """The tensors of a model directory, quantised or not. `say`: log which are not read. Raises CheckpointError:
    quantised by a method that is not read here, or with tensors that do not belong together (all of them are named).
    """
    reader = Reader(path, u16_is_bf16=True)
    settings = quantisation_of(path)
    if not settings:
        return reader
    method = settings.get("quant_method", settings.get("quantization"))
    recognise = METHODS.get(method) if isinstance(method, str) else None
    if recognise is None:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: quantization_config: weights of the method {method!r:.60} are not read here, only "
            f"{', '.join(METHODS)}. Use the bfloat16 checkpoint of the model."
        )
    found = recognise(reader, settings)
    if found.unsupported:
        raise CheckpointError(
            f"{path}: weights that are quantised in this form ({method}) are not read here: "
            f"{listed(found.unsupported)}. Use the bfloat16 checkpoint of the model."
        )
    if not found.matrices and not found.problems:
        found.problems.append(f"{CONFIG_FILE} says that the weights are quantised ({method}), and no tensor is")
    if found.problems:
        raise CheckpointError(
            f"{path}: the quantised weights are incomplete or of another format: {listed(found.problems)}. Copy the "
            "directory again from where it was quantised."
        )
    for reason, names in found.left_out.items() if say else ():
        log.info(
            f"{path}: {count_of(len(names), 'tensor is', 'tensors are')} not read, because {reason}: {listed(names)}"
        )
    return QuantisedReader(reader, found, str(method))


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
