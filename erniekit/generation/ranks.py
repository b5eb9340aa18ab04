"""What the ranks of one copy of a model tell one another while they generate.

The tensor ranks of all pipeline stages share one copy of the model. The last stage has the logits, and its first
tensor rank chooses the tokens. The tokens are sent, not the logits: that is 8 bytes a row instead of the vocabulary,
ranks cannot choose differently, and sampling without a seed needs no agreement about one.
"""

import json
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
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8) if leads(mesh) else np.empty(0, np.uint8)
    length = int(_broadcast(np.array([len(data)]), mesh, 0)[0])
    text = _broadcast(data if leads(mesh) else np.zeros(length, np.uint8), mesh, 0)
    return json.loads(text.astype(np.uint8).tobytes())


def _broadcast(values: np.ndarray, mesh: Mesh, stage: int) -> np.ndarray:
    """From the first tensor rank of `stage` to the others of that stage, and from each of them to its pipeline."""
    if mesh.degrees.pipeline * mesh.degrees.tensor == 1:
        return values
    tensor = paddle.to_tensor(values.astype(np.int64))
    if mesh.pipe == stage:
        comm.broadcast_(tensor, 0, mesh.tensor_group)
    comm.broadcast_(tensor, stage, mesh.pipe_group)
    return tensor.numpy()
