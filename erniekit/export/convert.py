"""Converts model directories to the other layout, or to another dtype or shard size, tensor by tensor.

Values are not changed unless a dtype is given: -PT -> -Paddle -> -PT gives the same bits. Every tensor is read again
from the finished files and compared. Neither Paddle nor PyTorch is needed, and about two tensors are in memory at a
time.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.generation_config import read_generation_config
from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.model_dir import copy_companions, has_weights, is_adapter, not_copied, write_configs
from erniekit.checkpoint.model_reader import METADATA, ModelReader
from erniekit.checkpoint.processor import complete_for_transformers, settings_of, write_processor
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.target import model_target
from erniekit.models.config import FORMATS, Format, ModelConfig
from erniekit.models.overrides import Overrides
from erniekit.models.weights import Logical
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.wording import count_of


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of tensors, bytes and weight files that were written and verified."""

    num_tensors: int
    num_bytes: int
    num_files: int

    def __str__(self) -> str:
        return (
            f"{count_of(self.num_tensors, 'tensor')}, {self.num_bytes / 1e9:.3f} GB, "
            f"{count_of(self.num_files, 'weight file')}"
        )


def convert(
    source_dir: str | Path,
    target_dir: str | Path,
    format: Format,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the model of `source_dir` (its layout is recognised by its names) to `target_dir` in `format`.

    `dtype`: the type of the target's weights (router and correction bias become float32); None keeps each tensor's own.
    Multi-token-prediction tensors, tokenizer and chat template are copied; other files are named in a log line.
    Another model in `target_dir` is replaced only with `overwrite`. Raises CheckpointError: unknown, missing or
    misshapen tensors (all listed), a full disk, a damaged file.
    """
    require_apart(source_dir, target_dir)
    if is_adapter(source_dir) and not has_weights(Path(source_dir)):
        raise CheckpointError(f"{source_dir} is an adapter: `erniekit export` merges it, in either layout.")
    with model_target(target_dir, "convert", [source_dir], overwrite, "overwrite=true") as staging:
        report = rewrite(source_dir, staging, format, max_shard_size, dtype)
        copy_companions(source_dir, staging)
        config = ModelConfig.from_dir(staging, quiet=True)
        write_processor(staging, config, settings_of(Path(source_dir)))
        if format == "pt":
            complete_for_transformers(staging, config)
    tell_not_copied(source_dir)
    log.info(f"{target_dir}: {report}, layout {format}; read again and equal to {source_dir}")
    return report


def require_apart(source_dir: str | Path, target_dir: str | Path) -> None:
    """Raise CheckpointError if the target is the source, which an error could otherwise destroy."""
    if Path(source_dir).resolve() == Path(target_dir).resolve():
        raise CheckpointError(f"source and target are the same directory, {source_dir}. Choose another target.")


def tell_not_copied(source_dir: str | Path) -> None:
    """Log one line with the files that are not copied."""
    names = not_copied(source_dir)
    if names:
        log.info(f"{source_dir}: not copied (neither weights nor tokenizer): {', '.join(names)}")


class Edit(Protocol):
    """A change of some weights during the conversion (see export.merge.Merge)."""

    def touches(self, logical: Logical) -> bool:
        """Whether the edit changes this weight."""
        ...

    def apply(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        """The changed weight; both are fp32 in our layout."""
        ...


def rewrite(
    source_dir: str | Path,
    target_dir: Path,
    format: Format,
    max_shard_size: int | str,
    dtype: str | None,
    edit: Callable[[ModelReader], Edit] | None = None,
    overrides: Overrides | None = None,
) -> Report:
    """Write weights, config.json and, if there is none, generation_config.json; then verify them (see `convert`).
    `edit` makes the change of weights for an opened source. `overrides` are changes of config.json.
    """
    if format not in FORMATS:
        raise CheckpointError(f"unknown weight format {format!r}: use 'pt' (Hugging Face) or 'paddle'.")
    source = ModelReader(source_dir, keep_mtp=True)
    read_generation_config(source_dir, source.config)  # it is copied, and a model with a wrong one cannot be loaded
    if source.quantised and dtype is None:
        dtype = source.config.dtype or "bfloat16"
        log.info(f"{source_dir}: quantised weights ({source.quantised}) are written as what they stand for, in {dtype}")
    editor = None if edit is None else edit(source)
    edited: dict[str, int] = {}
    target_dtype = {id(logical): _target_dtype(source, logical, dtype) for logical in source.logicals}
    plan: Plan = [
        (piece.name, target_dtype[id(logical)], piece.shape)
        for logical in source.logicals
        for piece in logical.pieces(format)
    ]
    with Writer(target_dir, plan, max_shard_size, METADATA[format]) as writer:
        for logical in source.logicals:
            touched = editor is not None and editor.touches(logical)
            array = _read_as(source, logical, target_dtype[id(logical)], editor if touched else None)
            for piece in logical.pieces(format):
                stored = piece.extract(array)
                writer.write(piece.name, stored)
                if touched:
                    edited[piece.name] = digest(stored)
                del stored
            del array  # free both before the next weight is read
    model_config = source.config if overrides is None else overrides.apply(source.config)
    write_configs(target_dir, dataclasses.replace(model_config, dtype=_config_dtype(source, dtype)), format)
    _verify(source, target_dir, edited)
    return Report(len(plan), writer.num_bytes, len(writer.files))


def _target_dtype(source: ModelReader, logical: Logical, dtype: str | None) -> str:
    if dtype is None:
        return source.dtype_of(logical)
    return "F32" if logical.keep_fp32 else dtypes.header_name(dtype)


def _config_dtype(source: ModelReader, dtype: str | None) -> str | None:
    """The dtype for config.json: the requested one, or the source's, or that of its first tensor, the embeddings."""
    if dtype is not None:
        return dtypes.LONG_NAMES[dtypes.header_name(dtype)]
    return source.config.dtype or dtypes.LONG_NAMES.get(source.dtype_of(source.logicals[0]))


def _read_as(source: ModelReader, logical: Logical, dtype: str, editor: Edit | None) -> np.ndarray:
    try:
        if editor is not None:
            changed = editor.apply(logical, source.read(logical, as_fp32=True))
            return dtypes.convert(changed, "F32", dtype)
        return dtypes.convert(source.read(logical), source.dtype_of(logical), dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {logical.param}: {error}") from error


def _verify(source: ModelReader, target_dir: Path, edited: Mapping[str, int]) -> None:
    """Read every tensor of the target, convert it back to the source's layout, and compare the checksum of its bits
    with the source's. Edited tensors are compared with the checksums of what was written, by their names in the target.
    Tensors that are not finite are named in a warning.

    Checksums are compared, so that both sides need not be in memory at the same time.
    """
    target = ModelReader(target_dir, keep_mtp=True, quiet=True)
    assert len(target.logicals) == len(source.logicals)
    not_finite: list[str] = []
    for logical in source.logicals:
        in_our_layout = target.read(logical)
        dtype = target.dtype_of(logical)
        if not dtypes.all_finite(in_our_layout, dtype):
            pieces = logical.pieces(target.format)
            not_finite += [piece.name for piece in pieces if not dtypes.all_finite(piece.extract(in_our_layout), dtype)]
        if any(piece.name in edited for piece in logical.pieces(target.format)):
            for piece in logical.pieces(target.format):
                if digest(piece.extract(in_our_layout)) != edited[piece.name]:
                    raise _misread(piece.name, source, target_dir)
            continue
        for piece in logical.pieces(source.format):
            written = digest(piece.extract(in_our_layout))
            original = source.read_piece(piece)
            if digest(dtypes.convert(original, source.info(piece.name).dtype, dtype)) != written:
                raise _misread(piece.name, source, target_dir)
        del in_our_layout
    if not_finite:
        log.warning(
            f"NaN or infinite values are written as they are: {listed(not_finite)}. A model with such weights gives no "
            "answers: use an earlier checkpoint"
        )


def _misread(name: str, source: ModelReader, target_dir: Path) -> CheckpointError:
    return CheckpointError(
        f"{name} read again from {target_dir} differs from {source.path}: the disk or the memory of this machine is at "
        "fault, or the source has changed. Nothing was kept; try again."
    )


def digest(array: np.ndarray, before: int = 0) -> int:
    """A checksum of the bits of a contiguous array, behind others whose checksum is `before`: CRC-32, which finds every
    run of up to 32 changed bits and misses one in 4e9 other faults, at twice the speed of a cryptographic digest.
    """
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, before)
