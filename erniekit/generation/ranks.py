"""Communication between the ranks of one copy of a model during generation.

The tensor ranks of all pipeline stages share one copy of the model. The last stage has the logits, and its first
tensor rank chooses the tokens. The tokens are sent, not the logits: that is 8 bytes a row instead of the vocabulary,
ranks cannot choose differently, and sampling without a seed needs no agreement about one.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh


def chooses(mesh: Mesh) -> bool:
    """Whether this rank is the one that chooses the tokens."""
    return mesh.is_last_stage and mesh.tensor == 0


def leads(mesh: Mesh) -> bool:
    """Whether this rank decides what the copy of the model generates: the first tensor rank of the first stage."""
    return mesh.is_first_stage and mesh.tensor == 0


def from_chooser(values: np.ndarray, mesh: Mesh) -> np.ndarray:
    """int64 values of the rank that chooses -> the same on every rank of the copy; all give an array of one shape."""
    return _broadcast(values, mesh, mesh.degrees.pipeline - 1)


def from_leader(value: Any, mesh: Mesh) -> Any:
    """A value of JSON's types from the rank that leads -> the same on every rank of the copy."""
    if mesh.degrees.pipeline * mesh.degrees.tensor == 1:
        return value
    return json.loads(_bytes_from_leader(json.dumps(value).encode() if leads(mesh) else b"", mesh))


def arrays_from_leader(arrays: Sequence[np.ndarray], mesh: Mesh) -> list[np.ndarray]:
    """Arrays of the rank that leads -> the same on every rank of the copy, of which the others give none."""
    if mesh.degrees.pipeline * mesh.degrees.tensor == 1:
        return list(arrays)
    result: list[np.ndarray] = []
    for dtype, shape in from_leader([(array.dtype.str, array.shape) for array in arrays], mesh):
        data = np.ascontiguousarray(arrays[len(result)]).tobytes() if leads(mesh) else b""
        result.append(np.frombuffer(_bytes_from_leader(data, mesh), dtype).reshape(shape))
    return result


def _bytes_from_leader(data: bytes, mesh: Mesh) -> bytes:
    """Bytes of the rank that leads -> the same on every rank, eight of them in each integer that is sent."""
    length = int(_broadcast(np.array([len(data)]), mesh, 0)[0])
    words = np.zeros(-(-length // 8), np.int64)
    if leads(mesh):
        words.view(np.uint8)[:length] = np.frombuffer(data, np.uint8)
    return _broadcast(words, mesh, 0).tobytes()[:length] if length else b""


def _broadcast(values: np.ndarray, mesh: Mesh, stage: int) -> np.ndarray:
    """Send values from the first tensor rank of `stage` to the others of that stage, and from each to its pipeline."""
    if mesh.degrees.pipeline * mesh.degrees.tensor == 1:
        return values
    tensor = paddle.to_tensor(values.astype(np.int64))
    if mesh.pipe == stage:
        comm.broadcast_(tensor, 0, mesh.tensor_group)
    comm.broadcast_(tensor, stage, mesh.pipe_group)
    return tensor.numpy()
