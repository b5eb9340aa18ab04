"""Headers and indexes of safetensors files, read and checked before any tensor is read.

The format (huggingface/safetensors, "Format"): 8 bytes little-endian length of the header, the header as JSON
`{name: {dtype, shape, data_offsets}}` with an optional `__metadata__` of strings, then the tensors, without gaps. A
model that needs more than one file has `model.safetensors.index.json` with `{"weight_map": {name: file}}`.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erniekit.checkpoint.dtypes import STORAGE
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import kind, open_regular, parse_json, read_json_object
from erniekit.utils.wording import count_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

# The tensors to write, in order: (name, header dtype, shape).
Plan = list[tuple[str, str, tuple[int, ...]]]

_MAX_HEADER = 100_000_000  # the limit of the format's own library
_MAX_INDEX = 1 << 28
_MAX_AXES = 32  # numpy's oldest limit
_MAX_BYTES = 1 << 62  # of one tensor, without axes of length 0; numpy counts bytes in 63 bits
_MAX_NAME = 255  # bytes of a file name


class TensorInfo(NamedTuple):
    """Type and shape of a tensor in a header; `dtype` is the header's name (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """The place of a tensor: `size` bytes from `start` in `file`."""

    file: Path
    info: TensorInfo
    start: int
    size: int


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def read_index(file: Path) -> dict[str, str]:
    """Read an index: tensor name -> name of the file beside the index. CheckpointError names the file."""
    weight_map = read_json_object(file, CheckpointError, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{file} is not an index of weight files: weight_map must be an object of tensor and file names, found "
            f"{kind(weight_map)}{' without any' if weight_map == {} else ''}. Copy the file again."
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_beside(shard):
            raise CheckpointError(
                f"{file}: {name!r:.99} is listed in {shard!r:.99}, which is not a safetensors file beside it."
            )
    return weight_map


def _is_beside(name: str) -> bool:
    plain = name.isprintable() and not any(mark in name for mark in "/\\:") and not name.startswith(".")
    return plain and name.endswith(".safetensors") and len(name.encode()) <= _MAX_NAME


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one file, or CheckpointError with the file, what is wrong, and what to do."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}. The file is damaged or not a safetensors file: copy it again.")

    try:
        with open_regular(path, CheckpointError) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
                raise bad(f"{size} bytes, too short for the header that it announces")
            content = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} not found. Copy the model again: a weight file is missing.") from None
    header = _parse(content, bad)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("__metadata__ in its header is not an object of strings")
    begin = 8 + length
    entries = {name: _entry_of(path, name, value, begin, bad) for name, value in header.items()}
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise bad(f"tensor {name!r:.99} {'overlaps another' if entry.start < end else 'leaves a gap before it'}")
        end += entry.size
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise bad(f"{size} bytes where its header asks for {end}: {state}")
    return entries, metadata


def _parse(content: bytes, bad: Callable[[str], CheckpointError]) -> dict[str, Any]:
    if not content.startswith(b"{"):
        raise bad("its header is not JSON: an object begins with {")
    try:
        return parse_json(content.decode("utf-8"), "its header", CheckpointError, number=_natural)
    except UnicodeDecodeError:
        raise bad("its header is not JSON: not UTF-8 text") from None
    except CheckpointError as error:
        raise bad(str(error).rstrip(".")) from None


def _entry_of(path: Path, name: str, value: Any, base: int, bad: Callable[[str], CheckpointError]) -> Entry:
    shown = f"tensor {name!r:.99}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise bad(f"{shown}: its entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise CheckpointError(f"{path}: {shown} has type {dtype!r:.40}, which is not supported.")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise bad(f"{shown}: shape {shape!r:.60} and offsets {offsets!r:.60} are not lists of natural numbers")
    item = STORAGE[dtype].itemsize
    if len(shape) > _MAX_AXES or math.prod([length for length in shape if length]) * item > _MAX_BYTES:
        raise bad(f"{shown}: no tensor can have the shape {shape!r:.60}")
    start, stop = offsets
    if stop - start != math.prod(shape) * item:
        raise bad(f"{shown}: {stop - start} bytes for {dtype} of shape {shape}")
    return Entry(path, TensorInfo(dtype, tuple(shape)), base + start, stop - start)


def _natural(text: str) -> int:
    """A natural number; -1 for every other one (also -0, which int() accepts), because none is valid in a header."""
    return int(text) if text.isdigit() else -1


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def unusable_weights(directory: Path) -> str | None:
    """What to say of weight files that are not a whole model in a directory without one; None if there are none."""
    shards = list(directory.glob("model-*-of-*.safetensors"))
    if shards:
        return (
            f"{directory} holds {count_of(len(shards), 'weight shard')} but no {INDEX_FILE}: a download or a save was "
            "interrupted. Copy the model again, or use an earlier checkpoint."
        )
    other = sorted(file.name for file in directory.glob("*") if file.suffix in (".pdparams", ".bin", ".safetensors"))
    if not other:
        return None
    if "adapter_model.safetensors" in other:
        return (
            f"{directory} holds a LoRA adapter and no model: name its base model there, and the adapter as lora_path "
            "(in Python adapter=)."
        )
    cure = "Convert them to safetensors (docs/weights.md)"
    if all(name.endswith(".safetensors") for name in other):
        cure = f"Rename the file of a whole model to {SINGLE_FILE}"
    return (
        f"no weights in {directory}: expected {SINGLE_FILE} or {INDEX_FILE}. It has {', '.join(other[:3])}, which this "
        f"toolkit does not read as a model. {cure}, or check the path."
    )
