"""Models from and to directories with config.json and safetensors, in the "-PT" or the "-Paddle" layout."""

import dataclasses
from itertools import groupby
from pathlib import Path

import numpy as np
import paddle

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.folder import GENERATION_CONFIG_FILE, staged, write_configs
from erniekit.checkpoint.safetensors import Writer
from erniekit.checkpoint.source import METADATA, Source, plan_for, read_config
from erniekit.models.config import FORMATS, Format, ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.local import named_cuts
from erniekit.models.partition import WHOLE
from erniekit.models.weights import Logical, export_tensors, logical_tensors
from erniekit.nn.cut import Cut, take
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, UserError

__all__ = ["load_model", "load_weights", "read_config", "save_model"]


def load_weights(model: paddle.nn.Layer, path: str | Path, stored: ModelConfig | None = None) -> None:
    """Fill `model` (with a `.config`) from the directory `path`, a parameter at a time; its dtypes stay.

    `stored`: what the directory holds, where that is only part of the model; the rest is left as it is.
    Raises CheckpointError with every missing, unexpected and misshapen tensor.
    """
    _fill(model, Source(path, stored or model.config), through=None)


def load_model(path: str | Path, dtype: str = "float32", adapter: str | None = None) -> CausalLM:
    """The model in directory `path`, in eval mode.

    `dtype`: "float32", "bfloat16" or "float16" of the parameters; router and correction bias stay float32. On a CPU,
    where Paddle cannot multiply the short types, the weights are rounded through them and held in float32.
    Raises CheckpointError (see `Source`), UserError for an adapter, which this version cannot apply.
    """
    if adapter is not None:
        raise UserError(
            f"adapter {adapter!r}: adapters come with LoRA, which this version does not have yet. Leave it out."
        )
    target = dtypes.header_name(dtype)
    source = Source(path)
    on_cpu = paddle.get_device() == "cpu"
    if target != "F32" and on_cpu:
        log.info(f"{dtype} on CPU: the weights are rounded to it and computed with in float32")
    default = paddle.get_default_dtype()
    paddle.set_default_dtype("float32" if on_cpu else dtypes.LONG_NAMES[target])
    try:
        with paddle.LazyGuard():  # no memory and no random values before the weights arrive
            model = CausalLM(source.config)
    finally:
        paddle.set_default_dtype(default)
    _fill(model, source, through=target if on_cpu else None)
    model.eval()
    return model


def _fill(model: paddle.nn.Layer, source: Source, through: str | None) -> None:
    """Set every parameter and persistent buffer, rounding through the header dtype `through` if given. A model that is
    one part of several takes its share of each.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    cuts, part = named_cuts(model), model.part
    for param, logicals in groupby(source.logicals, key=lambda logical: logical.param):
        tensor = tensors.get(param)
        if tensor is None:
            assert part != WHOLE, f"the model has no {param}, which its configuration asks for"
            continue
        cut = cuts.get(param)
        array = _read(source, list(logicals), cut, (0, 1) if cut is None else part.share(cut), through)
        assert tuple(tensor.shape) == array.shape, (param, tensor.shape, array.shape)
        tensor.set_value(paddle.to_tensor(array).astype(tensor.dtype) if tensor.dtype != paddle.float32 else array)


def _read(
    source: Source, logicals: list[Logical], cut: Cut | None, share: tuple[int, int], through: str | None
) -> np.ndarray:
    """A share (index, count) of one parameter as float32; of stacked experts, only those wanted are read."""

    def whole(logical: Logical) -> np.ndarray:
        array = source.read(logical, as_fp32=True)
        if through is None or logical.keep_fp32:
            return array
        return dtypes.to_fp32(dtypes.convert(array, "F32", through), through)

    index, count = share
    if logicals[0].index is None:
        return whole(logicals[0]) if cut is None else np.ascontiguousarray(take(whole(logicals[0]), cut, index, count))
    held = len(logicals) // count
    stack = np.empty((held, *logicals[0].shape), np.float32)
    for place, logical in enumerate(logicals[index * held : (index + 1) * held]):
        stack[place] = whole(logical)
    return stack


def save_model(
    model: paddle.nn.Layer,
    path: str | Path,
    format: Format = "pt",
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
) -> None:
    """Write weights, config.json and generation_config.json (kept if there is one) to directory `path`.

    `format`: "pt" (Hugging Face; loads in transformers) or "paddle". `dtype` of the file: float32 unless given; router
    and correction bias are always float32. The directory is complete or as it was before; a full disk is a
    CheckpointError. One parameter is copied at a time.
    """
    if format not in FORMATS:
        raise CheckpointError(f"unknown weight format {format!r}: use 'pt' (Hugging Face) or 'paddle'.")
    header = dtypes.header_name(dtype or "float32")
    config = dataclasses.replace(model.config, dtype=dtypes.LONG_NAMES[header])
    plan = plan_for(logical_tensors(config), format, header)
    with staged(path) as staging:
        with Writer(staging, plan, max_shard_size, METADATA[format]) as writer:
            for (name, stored, _), (exported, array) in zip(plan, export_tensors(model, format), strict=True):
                assert name == exported
                try:
                    writer.write(name, dtypes.convert(array, "F32", stored))
                except CheckpointError as error:
                    raise CheckpointError(f"{path}: {name}: {error}") from error
        write_configs(staging, config, format)
        if (Path(path) / GENERATION_CONFIG_FILE).exists():
            (staging / GENERATION_CONFIG_FILE).unlink()
