"""Finds the quantised matrices of a directory: from the tensors that it has, and what config.json says of them.

Read are: compressed-tensors (packed and unpacked whole numbers, symmetric or not; E4M3 by tensor, channel or block),
block FP8 as transformers and vLLM write it, and FastDeploy's wint8, wint4, w4a8, tensor_wise_fp8 and wint2.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from erniekit.checkpoint import quantised_paddle, wint2_codec
from erniekit.checkpoint.dtypes import FLOATS
from erniekit.checkpoint.quantised_codecs import Codec, PackQuantized, Unpacked
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.precision.codes import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, CodeSpec, full_range

# The formats of compressed-tensors whose tensors are read; "mixed-precision": each group has its own.
_COMPRESSED_FORMATS = tuple(
    "dense pack-quantized int-quantized float-quantized naive-quantized mixed-precision".split()
)


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix of a directory: `name` without `.weight`, `shape` [out, in], and its codec."""

    name: str
    shape: tuple[int, int]
    codec: Codec


@dataclass
class Recognised:
    """What was found in a directory. `left_out`: reason -> tensors that are not read. `problems`: what does not fit.
    `unsupported`: what belongs to a form of quantised weights that is not read here, however complete it is.
    """

    matrices: list[StoredMatrix] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def add(self, reader: Reader, name: str, shape: tuple[int, ...], codec: Codec) -> None:
        """Add a matrix if it has all its tensors, each of the right type and shape; axes of length 1 do not matter."""
        if len(shape) != 2 or 0 in shape:
            self.problems.append(f"{name}: codes of a matrix {list(shape)}")
            return
        wrong = []
        for part, dtype, expected in codec.plan(name, (shape[0], shape[1])):
            if part not in reader:
                wrong.append(f"{part} missing")
                continue
            found = reader.info(part)
            if [n for n in found.shape if n != 1] != [n for n in expected if n != 1]:
                wrong.append(f"{part} {list(found.shape)}, expected {list(expected)}")
            elif found.dtype != dtype and not {found.dtype, dtype} <= {*FLOATS}:
                wrong.append(f"{part} has type {found.dtype}, expected {dtype}")
        self.problems += wrong
        if not wrong:
            self.matrices.append(StoredMatrix(name, (shape[0], shape[1]), codec))

    def leave_out(self, reader: Reader, ending: str, reason: str) -> None:
        """Do not read the tensors whose names match `ending`."""
        found = [name for name in reader.keys() if re.search(ending, name)]  # noqa: SIM118 - a Reader is not iterable
        if found:
            self.left_out.setdefault(reason, []).extend(found)


def _stems(reader: Reader, ending: str) -> Iterator[str]:
    """The names that end in `ending`, without it."""
    return (name.removesuffix(ending) for name in reader.keys() if name.endswith(ending))  # noqa: SIM118


def _compressed_tensors(reader: Reader, settings: Mapping[str, Any]) -> Recognised:
    found = Recognised(unsupported=list(_unsupported_settings(settings)))
    indexed = list(_stems(reader, ".weight_g_idx"))
    if indexed:
        found.unsupported.append(f"{indexed[0]}.weight_g_idx: groups in the order of their activations")
    if found.unsupported:
        return found
    for name in _stems(reader, ".weight_packed"):
        _packed(reader, name, found)
    for name in _stems(reader, ".weight_scale"):
        if f"{name}.weight_packed" not in reader:
            _unpacked(reader, name, _blocks_of(settings), found)
    if _is_asymmetric(settings) and not any(_stems(reader, ".weight_zero_point")):
        found.problems.append("config.json says symmetric: false, and no matrix has its weight_zero_point")
    found.leave_out(reader, r"\.(input|output)_(scale|zero_point)$", "activations are not quantised here")
    found.leave_out(reader, r"\.[kv]_scale$", "the cache is not quantised here")
    return found


def _groups_of(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The config groups of compressed-tensors by name, each the modules that are quantised in one way."""
    groups = settings.get("config_groups")
    found = groups.items() if isinstance(groups, Mapping) else ()
    return {str(name): group for name, group in found if isinstance(group, Mapping)}


def _unsupported_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """What the settings of compressed-tensors say of weights in a form that is not read here."""
    for where, said in {"quantization_config": settings, **_groups_of(settings)}.items():
        if said.get("format") is not None and said["format"] not in _COMPRESSED_FORMATS:
            yield f"{where}: format: {said.get('format')!r:.40}"
    for name, group in _groups_of(settings).items():
        weights = group.get("weights")
        kind = (weights.get("type", "int"), weights.get("num_bits", 8)) if isinstance(weights, Mapping) else None
        if kind not in (None, ("int", 4), ("int", 8), ("float", 8)):
            yield f"{name}: weights of the type {kind[0]!r:.40} in {kind[1]!r:.40} bits"
    if _locations(settings.get("transform_config")) - {"weight_input", "weight_output"}:
        yield "transform_config: inputs or outputs that the engine transforms"


def _locations(transforms: Any) -> set[str]:
    """Where the transforms of compressed-tensors act: all values of `location`, at any depth."""
    if isinstance(transforms, Mapping):
        inner = set().union(*map(_locations, transforms.values()))
        return inner | {str(transforms["location"])} if "location" in transforms else inner
    return set().union(*map(_locations, transforms)) if isinstance(transforms, list) else set()


def _blocks_of(settings: Mapping[str, Any]) -> list[CodeSpec]:
    """E4M3 codes in blocks of the sizes that the settings of compressed-tensors name, else of the usual one."""
    weights = [group.get("weights") for group in _groups_of(settings).values()]
    named = [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    return [replace(FP8_BLOCK, block=(block[0], block[1])) for block in named if _is_block(block)] or [FP8_BLOCK]


def _is_block(block: Any) -> TypeGuard[list[int]]:
    """Whether a value of the settings is the size of a block, [out, in]."""
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _is_asymmetric(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of compressed-tensors give some weights codes that stand for 0 by a number of their own."""
    weights = [group.get("weights") for group in _groups_of(settings).values()]
    return any(isinstance(each, Mapping) and each.get("symmetric") is False for each in weights)


def _packed(reader: Reader, name: str, found: Recognised) -> None:
    sizes, scales = f"{name}.weight_shape", f"{name}.weight_scale"
    missing = [part for part in (sizes, scales) if part not in reader]
    if missing or reader.info(sizes).shape != (2,) or reader.info(sizes).dtype != "I64":
        found.problems.append(f"{', '.join(missing)} missing" if missing else f"{sizes} is not two numbers")
        return
    num_out, num_in = (int(size) for size in reader.read(sizes))
    words, groups = reader.info(f"{name}.weight_packed").shape, reader.info(scales).shape
    spec = _packed_spec(words, groups, num_out, num_in)
    if spec is None:
        found.problems.append(
            f"{name}: weight_packed {list(words)} and weight_scale {list(groups)} do not fit weight_shape "
            f"[{num_out}, {num_in}] in 4 or 8 bits"
        )
        return
    found.add(reader, name, (num_out, num_in), PackQuantized(spec, has_zeros=f"{name}.weight_zero_point" in reader))


def _packed_spec(words: tuple[int, ...], scales: tuple[int, ...], num_out: int, num_in: int) -> CodeSpec | None:
    """The codes of a matrix [out, in] that is packed into words, with scales of a shape; None if they do not fit."""
    bits = next((bits for bits in (4, 8) if words == (num_out, -(-num_in * bits // 32))), None)
    if bits is None:
        return None
    if scales in ((), (1,)):
        return replace(full_range(bits), whole=True)
    if len(scales) != 2 or not scales[1] or num_in % scales[1]:
        return None
    return full_range(bits, None if scales[1] == 1 else num_in // scales[1])


def _unpacked(reader: Reader, name: str, blocks: list[CodeSpec], found: Recognised) -> None:
    if f"{name}.weight" not in reader or len(reader.info(f"{name}.weight").shape) != 2:
        found.problems.append(f"{name}.weight_scale without the codes of a matrix")
        return
    kind, shape = reader.info(f"{name}.weight")
    scales, asymmetric = reader.info(f"{name}.weight_scale").shape, f"{name}.weight_zero_point" in reader
    spec = _spec_of(kind, shape, scales, blocks)
    if spec is None:
        form = f"{name}: weight {kind} {list(shape)} with weight_scale {list(scales)}"
        (found.problems if kind in ("I8", "F8_E4M3") else found.unsupported).append(form)
        return
    found.add(reader, name, shape, Unpacked(spec, has_zeros=asymmetric))


def _spec_of(kind: str, shape: tuple[int, ...], scales: tuple[int, ...], blocks: list[CodeSpec]) -> CodeSpec | None:
    """The codes of an unpacked matrix with scales of a shape; `blocks`: those in blocks that there may be. None if
    they are in no known form.
    """
    num_out, num_in = shape
    if kind not in ("I8", "F8_E4M3"):
        return None
    if math.prod(scales) == 1:
        return FP8_TENSOR if kind == "F8_E4M3" else replace(full_range(8), whole=True)
    for spec in blocks:
        if kind == "F8_E4M3" and scales == spec.scale_shape((num_out, num_in)) and num_out > scales[0]:
            return spec
    if len(scales) != 2 or scales[0] != num_out or not scales[1] or num_in % scales[1]:
        return None
    group = None if scales[1] == 1 else num_in // scales[1]
    return replace(FP8_CHANNEL if kind == "F8_E4M3" else full_range(8), group=group)


def _block_fp8(reader: Reader, settings: Mapping[str, Any]) -> Recognised:
    found = Recognised()
    block = settings.get("weight_block_size")
    if not _is_block(block):
        found.unsupported.append(f"weight_block_size {block!r:.40}: FP8 of this method has to have blocks of two sizes")
        return found
    codec = Unpacked(replace(FP8_BLOCK, block=(block[0], block[1])), scale_name="weight_scale_inv")
    for name in _stems(reader, ".weight_scale_inv"):
        if f"{name}.weight" in reader and len(reader.info(f"{name}.weight").shape) == 2:
            found.add(reader, name, reader.info(f"{name}.weight").shape, codec)
        else:
            found.problems.append(f"{name}.weight_scale_inv without the codes of a matrix")
    found.leave_out(reader, r"\.(input_scale|activation_scale)$", "activations are not quantised here")
    return found


def _fastdeploy(reader: Reader, settings: Mapping[str, Any]) -> Recognised:
    """Weights of FastDeploy's own methods, by the types that config.json names for experts and for the rest."""
    found = Recognised()
    method = settings.get("quantization", settings.get("quant_method"))
    dense, experts = (str(settings.get(f"{part}_quant_type") or method) for part in ("dense", "moe"))
    if experts == "w4a8" and settings.get("is_permuted", True):
        found.unsupported.append("is_permuted: true: experts in the order of a kernel")
        return found
    for name in _stems(reader, ".quant_weight"):
        kind = experts if ".mlp.experts." in name else dense
        if f"{name}.super_scales" in reader:
            kind = "wint2"
        elif kind == "w4w2":
            kind = "wint4"
        first, second = (*reader.info(f"{name}.quant_weight").shape, 0, 0)[:2]
        outputs_first, inputs_first = _FASTDEPLOY_ROWS.get(kind), _FASTDEPLOY_COLUMNS.get(kind)
        if outputs_first is not None:
            codec, per_output = outputs_first
            found.add(reader, name, (first * per_output, second), codec)
        elif inputs_first is not None:
            pick, per_row = inputs_first
            found.add(reader, name, (second, first * per_row), pick(name))
        else:
            found.unsupported.append(f"{name}: codes of the type {kind!r:.40}")
    found.leave_out(reader, r"\.cache[kv]_matmul\.activation_(scale|zero_point)$", "the cache is not quantised here")
    return found


# Codes [rows, in] -> codec and the outputs of a row; codes [rows, out] -> codec by name and the inputs of a row.
_FASTDEPLOY_ROWS: dict[str, tuple[Codec, int]] = {
    "wint8": (quantised_paddle.WINT8, 1),
    "wint4": (quantised_paddle.WINT4, 2),
}
_FASTDEPLOY_COLUMNS: dict[str, tuple[Callable[[str], Codec], int]] = {
    "w4a8": (
        lambda name: quantised_paddle.W4A8_DOWN if name.endswith("down_proj") else quantised_paddle.W4A8_UP_GATE,
        2,
    ),
    "tensor_wise_fp8": (lambda name: quantised_paddle.TENSOR_WISE_FP8, 1),
    "wint2": (lambda name: wint2_codec.CODEC, 4),
}

METHODS: dict[str, Callable[[Reader, Mapping[str, Any]], Recognised]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _block_fp8,
    "wint8": _fastdeploy,
    "wint4": _fastdeploy,
    "mix_quant": _fastdeploy,
    "tensor_wise_fp8": _fastdeploy,
    "wint2": _fastdeploy,
}
