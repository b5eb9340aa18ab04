"""Results of a quantisation with calibration, in a directory: codes, scales and folded weights of every finished layer,
and the hidden states that the next layer gets, so that an interrupted run continues behind its last finished layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer, write_error
from erniekit.precision.codes import CodeSpec
from erniekit.precision.convolutional_code import WORD
from erniekit.precision.weight_only import pack, unpack
from erniekit.quantize.layer_pass import LayerReport, MatrixReport
from erniekit.utils import atomic, log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object

_IDENTITY, _REPORT, _HIDDEN = "identity.json", "report.json", "hidden.npy"
# The largest file of results; more would only be more files.
_SHARD = "50GB"


class LayerStore:
    """The finished layers of one quantisation in `directory`. `identity` has all that the results depend on, as JSON
    values under names that a user knows. Results of anything else in the directory are removed, with a log line.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        identity = json.loads(json.dumps(identity))
        try:
            before: dict[str, Any] | None = read_json_object(directory / _IDENTITY, CheckpointError)
        except FileNotFoundError:
            before = None
        if before is not None and before != identity:
            changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
            log.warning(
                f"{directory} has layers of an interrupted quantisation with other settings ({', '.join(changed)}): "
                "they are removed, and the first layer is quantised again"
            )
            atomic.remove_tree(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            atomic.write_json(directory / _IDENTITY, identity)
        except OSError as error:
            raise write_error(error, directory) from error

    @property
    def num_finished(self) -> int:
        """The number of layers, from the first on, that need not be quantised again."""
        number = 0
        while (self._layer(number) / _REPORT).is_file():
            number += 1
        while number and not (self._layer(number - 1) / _HIDDEN).is_file():
            number -= 1
        return number

    def hidden(self, number: int) -> np.ndarray:
        """The output of layer `number` [T, D] fp32."""
        file = self._layer(number) / _HIDDEN
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}. Remove {self.directory} to begin the quantisation again."
            ) from None

    def finish(self, report: LayerReport, hidden_TD: np.ndarray) -> None:
        """Keep a layer's output and report, which marks it as finished; the output of the layer before is removed."""
        directory = self._layer(report.number)
        try:
            with atomic.new_file(directory / _HIDDEN) as temporary, open(temporary, "wb") as file:
                # np.save, which writes around Python, raises an error without a number where the disk is full.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(hidden_TD))
                file.write(np.ascontiguousarray(hidden_TD).data)
            atomic.write_json(directory / _REPORT, asdict(report))
        except OSError as error:
            raise write_error(error, directory, hidden_TD.nbytes) from error
        if report.number:
            (self._layer(report.number - 1) / _HIDDEN).unlink(missing_ok=True)

    def reports(self, count: int) -> list[LayerReport]:
        """The reports of the first `count` layers."""
        reports = []
        for number in range(count):
            content = read_json_object(self._layer(number) / _REPORT, CheckpointError)
            try:
                content["matrices"] = [MatrixReport(**matrix) for matrix in content["matrices"]]
                content["expert_tokens"] = {int(key): value for key, value in content["expert_tokens"].items()}
                reports.append(LayerReport(**content))
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                file = self._layer(number) / _REPORT
                raise CheckpointError(
                    f"{file} cannot be read: {error}. Remove {self.directory} to begin the quantisation again."
                ) from None
        return reports

    def writer(self, number: int, plan: Plan) -> Writer:
        """A writer of the tensors of a layer; the layer is not finished before `finish`."""
        (self._layer(number) / _REPORT).unlink(missing_ok=True)
        return Writer(self._layer(number), plan, _SHARD)

    def reader(self, number: int) -> Reader:
        """A reader of the tensors of a finished layer. CheckpointError where its file is damaged."""
        try:
            return Reader(self._layer(number))
        except CheckpointError as error:
            raise CheckpointError(f"{error} Remove {self.directory} to begin the quantisation again.") from None

    def remove(self) -> None:
        """Remove everything."""
        atomic.remove_tree(self.directory)

    def _layer(self, number: int) -> Path:
        return self.directory / f"layer-{number:05d}"


def code_entries(name: str, spec: CodeSpec, shape: Sequence[int]) -> Plan:
    """How the codes and scales of a tensor [out, in] are stored: 4-bit codes two a byte."""
    num_out, num_in = shape
    code_type, width = ("I8" if spec.kind == "int" else "U8"), num_in
    if spec.kind == "convolutional":
        width = num_in // WORD
    elif _is_packed(spec):
        code_type, width = "U8", -(-num_in // 2)
    scales = spec.scale_shape((num_out, num_in))
    return [(f"{name}.codes", code_type, (num_out, width)), (f"{name}.scales", "F32", scales)]


def stored_codes(codes: np.ndarray, spec: CodeSpec) -> np.ndarray:
    """Codes of codes.encode as they are stored."""
    return pack(codes + np.int8(8)) if _is_packed(spec) else codes


def read_codes(stored: np.ndarray, spec: CodeSpec, num_in: int) -> np.ndarray:
    """The inverse of `stored_codes`."""
    return unpack(stored, num_in).astype(np.int8) - np.int8(8) if _is_packed(spec) else stored


def _is_packed(spec: CodeSpec) -> bool:
    return spec.kind == "int" and spec.bits <= 4
