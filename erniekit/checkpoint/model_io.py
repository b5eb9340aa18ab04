"""Loads and saves models: directories with config.json and safetensors, in the "-PT" or the "-Paddle" layout."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import paddle

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.model_dir import (
    GENERATION_CONFIG_FILE,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    copy_companions,
    staged,
    write_configs,
)
from erniekit.checkpoint.model_reader import METADATA, ModelReader, plan_for, read_config
from erniekit.checkpoint.processor import settings_of, write_processor
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.reshard import Shares
from erniekit.lora import state_of
from erniekit.models.config import FORMATS, Format
from erniekit.models.products import held_weights
from erniekit.models.weights import Logical, is_output_head, logical_tensors
from erniekit.nn.product import Product
from erniekit.nn.shard import WHOLE, ShardSpec, named_shard_specs, shard
from erniekit.utils import atomic
from erniekit.utils.errors import CheckpointError

__all__ = ["fill_weights", "load_weights", "model_rank_files", "read_config", "save_model"]


class WeightSource(Protocol):
    """Weights that can be read: `logicals` are the units that there are."""

    logicals: list[Logical]

    def read(self, logical: Logical, as_fp32: bool = False) -> np.ndarray:
        """See ModelReader.read."""


def load_weights(model: paddle.nn.Layer, path: str | Path, into: Mapping[str, paddle.Tensor] | None = None) -> None:
    """Fill `model` (with a `.config`) from the directory `path`, whose tensors must be all of the model's. `into`:
    tensors that are filled instead of the model's, under its names (an average).

    Raises CheckpointError with every missing, unexpected and misshapen tensor.
    """
    fill_weights(model, ModelReader(path, model.config), into=into)


def fill_weights(
    model: paddle.nn.Layer,
    source: WeightSource,
    rounded_to: str | None = None,
    into: Mapping[str, paddle.Tensor] | None = None,
    on_set: Callable[[str, paddle.Tensor], None] = lambda name, tensor: None,
) -> None:
    """Set every parameter and persistent buffer from an open directory, one at a time; the model's dtypes stay. A
    sharded model reads its shard of each. A product that stores its weight is filled while the weight is read, experts
    one by one.

    `rounded_to`: the values are first rounded to this dtype ("bfloat16"). `into`: see `load_weights`. `on_set` is
    called with each tensor that has its values.
    """
    through = None if rounded_to is None else dtypes.header_name(rounded_to)
    tensors = named_tensors(model) if into is None else into
    stored_product = held_weights(model) if into is None else {}
    shard_specs, part = named_shard_specs(model), model.shard
    for param, logicals in groupby(source.logicals, key=lambda logical: logical.param):
        tensor = tensors.get(param)
        if tensor is None and param not in stored_product:
            is_left_out = model.config.has_score_head and is_output_head(param)
            assert part != WHOLE or is_left_out, f"the model has no {param}, which its configuration asks for"
            continue
        spec = shard_specs.get(param)
        units = list(logicals)
        pieces = _read(source, units, spec, (0, 1) if spec is None else part.share(spec), through)
        if tensor is None:
            _fill(stored_product[param][1], pieces, param)
            continue
        array = next(pieces) if units[0].index is None else _stacked(pieces, tuple(tensor.shape))
        assert tuple(tensor.shape) == array.shape, (param, tensor.shape, array.shape)
        tensor.set_value(paddle.to_tensor(array).astype(tensor.dtype) if tensor.dtype != paddle.float32 else array)
        on_set(param, tensor)


def _fill(product: Product, matrices: Iterator[np.ndarray], param: str) -> None:
    for index, matrix in enumerate(matrices):
        try:
            product.fill(index, matrix)
        except ValueError as error:
            raise CheckpointError(f"{param}: {error}: it cannot be quantised to {product.name}.") from None


def _stacked(matrices: Iterator[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    stack = np.empty(shape, np.float32)
    for index, matrix in enumerate(matrices):
        stack[index] = matrix
    return stack


def _read(
    source: WeightSource, logicals: list[Logical], spec: ShardSpec | None, share: tuple[int, int], through: str | None
) -> Iterator[np.ndarray]:
    """Read a shard (index, count) of one parameter as float32, whole or expert by expert, and nothing else."""

    def whole(logical: Logical) -> np.ndarray:
        array = source.read(logical, as_fp32=True)
        if through is None or logical.keep_fp32:
            return array
        return dtypes.to_fp32(dtypes.convert(array, "F32", through), through)

    index, count = share
    if logicals[0].index is None:
        yield (
            whole(logicals[0]) if spec is None else np.ascontiguousarray(shard(whole(logicals[0]), spec, index, count))
        )
        return
    num_local = len(logicals) // count
    for logical in logicals[index * num_local : (index + 1) * num_local]:
        yield whole(logical)


def save_model(
    model: paddle.nn.Layer,
    path: str | Path,
    format: Format = "pt",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
) -> None:
    """Write weights, config.json and generation_config.json to directory `path`; of a model that was loaded from a
    directory also tokenizer and chat template, and of a vision-language model the processor's files. Of these, files
    that are there already are kept.

    `format`: "pt" (Hugging Face; loads in transformers) or "paddle". `dtype` of the file: float32 unless given; router
    and correction bias are always float32. The directory is complete or as it was before; a full disk is a
    CheckpointError. One parameter is copied at a time.
    """
    if held_weights(model):
        raise CheckpointError(
            "the weights of this model are quantised and cannot be saved: save its adapter and merge "
            "it into the weights that the model was loaded from."
        )
    if state_of(model) is not None:
        raise CheckpointError(
            "this model has an adapter, which weight files cannot contain: merge it into the weights first "
            "(erniekit.lora.merge), or save the adapter (erniekit.checkpoint.peft_attach.save_adapter)."
        )
    if format not in FORMATS:
        raise CheckpointError(f"unknown weight format {format!r}: use 'pt' (Hugging Face) or 'paddle'.")
    header = dtypes.header_name(dtype or "float32")
    files = model_rank_files(model, Shares.alone(), format, header=header)
    files.max_shard_size = max_shard_size
    path = Path(path).expanduser()
    with staged(path) as staging:
        files.write(staging)
        write_model_configs(model, staging, format, header)
        write_processor(staging, model.config, settings_of(model.directory))
        if model.directory is not None:
            copy_companions(model.directory, staging, names=TOKENIZER_FILES)
        for name in (GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *PROCESSOR_FILES):
            if (path / name).exists():
                (staging / name).unlink(missing_ok=True)


def model_rank_files(
    model: paddle.nn.Layer,
    shares: Shares,
    format: Format,
    tensors: Mapping[str, paddle.Tensor] | None = None,
    directory: str = "",
    header: str = "F32",
) -> RankFiles:
    """This rank's weight files of a model, in `directory` below a checkpoint. `tensors` replace the parameters and
    buffers of `model` (an average). `header`: dtype of the files, as in `save_model`.
    """
    values = named_tensors(model) if tensors is None else tensors
    units: dict[str, list[Logical]] = {}
    for param, logicals in groupby(logical_tensors(model.config), key=lambda logical: logical.param):
        if param in values:
            rows = shares.rows(param, values[param].shape)
            units[param] = list(logicals)[slice(*rows) if rows else slice(None)]
        else:
            assert shares.shard != WHOLE, f"the model has no {param}, which its configuration asks for"

    def encode(param: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for place, logical in enumerate(units[param]):
            in_our_layout = array if logical.index is None else array[place]
            for piece in logical.pieces(format):
                try:
                    stored = dtypes.convert(piece.extract(in_our_layout), "F32", "F32" if logical.keep_fp32 else header)
                except CheckpointError as error:
                    raise CheckpointError(f"{piece.name}: {error}") from error
                yield piece.name, stored

    written = [logical for param in units if shares.writes(param) for logical in units[param]]
    whole = ((param, shares.gather(param, values[param])) for param in units)
    return RankFiles(directory, plan_for(written, format, header), whole, encode, METADATA[format])


def write_model_configs(model: paddle.nn.Layer, directory: Path, format: Format, header: str = "F32") -> None:
    """Write config.json and generation_config.json for the weights of `model`; `header` is the dtype of their files."""
    config = dataclasses.replace(model.config, dtype=dtypes.LONG_NAMES[header])
    write_configs(directory, config, format)
    if model.end_ids != config.end_ids:  # the model was loaded with a generation_config.json that has other end tokens
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(model.end_ids), "pad_token_id": model.fill_id}
        atomic.write_json(directory / GENERATION_CONFIG_FILE, ids)


def named_tensors(model: paddle.nn.Layer) -> dict[str, paddle.Tensor]:
    """The parameters and persistent buffers of a model, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
