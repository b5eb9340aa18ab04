"""The schemes of quantised files: which weights get which codes, in which files, and what config.json says of them.

One table, `SCHEMES`, has a row for every scheme and layout. Only projections of the decoder's layers are quantised:
never the embeddings, the head, norms, routers, multi-token prediction, the vision transformer and the resampler.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from erniekit.checkpoint import quantised_paddle as fastdeploy
from erniekit.checkpoint import wint2_codec
from erniekit.checkpoint.quantised_codecs import Codec, PackQuantized, Unpacked
from erniekit.models.config import Format, ModelConfig
from erniekit.models.weights import Logical, Piece, logical_tensors
from erniekit.precision.codes import FP8_BLOCK, full_range
from erniekit.quantize import settings
from erniekit.quantize.places import EXPERTS, Place, place_of
from erniekit.utils.errors import ConfigError

# Numbers of inputs that share a scale, the preferred one first: what vLLM's kernels take.
GROUPS = (128, 64, 32)
# The share of layers, the first ones, whose experts have 4 bits in wint2: that of the published 300B-A47B model.
_WINT2_FIRST_LAYERS = 7 / 54
_FASTDEPLOY, _VLLM = "FastDeploy on CUDA (not run here)", "vLLM (not run here)"


@dataclass(frozen=True)
class Matrix:
    """A matrix to quantise, in the order of the file: the piece of a logical tensor that is `name`.weight there. Its
    codes are [out, in]; `codec.rotated` gives what is quantised of it.
    """

    logical: Logical
    piece: Piece
    place: Place
    codec: Codec

    @property
    def name(self) -> str:
        """The name in the file, without its ending."""
        return self.piece.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        first, second = self.piece.shape
        return (first, second) if self.piece.transposed else (second, first)


@dataclass(frozen=True)
class Options:
    """`group`: the number of inputs that share a scale in 4 bits; None: chosen by the model's sizes. `first_layers`: of
    wint2, the number of layers whose experts have 4 bits; None: 7 of 54 in proportion.
    """

    group: int | None = None
    first_layers: int | None = None


@dataclass(frozen=True)
class Scheme:
    """A scheme for a model: `codec_of` is the codec of the weights at a place, or None where they stay in 16 bits;
    `settings` is what config.json says of it, `method` the words for a log line, and `readers` who loads such a file.
    """

    name: str
    format: Format
    codec_of: Callable[[Logical, Place], Codec | None]
    settings: Mapping[str, Any]
    method: str
    readers: str

    def matrices(self, logical: Logical) -> list[Matrix]:
        """The matrices to quantise of a weight, in the order of its pieces; none where it stays in 16 bits."""
        place = place_of(logical)
        codec = None if place is None else self.codec_of(logical, place)
        if place is None or codec is None:
            return []
        return [Matrix(logical, piece, place, codec) for piece in logical.pieces(self.format)]

    def every_matrix(self, config: ModelConfig) -> Iterator[Matrix]:
        """The matrices to quantise of a model."""
        return (matrix for logical in logical_tensors(config) for matrix in self.matrices(logical))


def scheme_for(
    name: str, format: Format, config: ModelConfig, options: Options = Options(), fits: bool = True
) -> Scheme:
    """The scheme `name` in files of `format` for a model. ConfigError: no reader of the scheme knows the format or such
    a model, or, if it has to be one that `fits`, the model's sizes (the tensor is named).
    """
    make = SCHEMES.get((name, format))
    if make is None:
        formats = [known for scheme, known in SCHEMES if scheme == name]
        if not formats:
            known = ", ".join(dict.fromkeys(scheme for scheme, _ in SCHEMES))
            raise ConfigError(f"quantization: {name}: no engine reads files of this scheme; use one of {known}")
        cure = f"set format: {' or '.join(formats)}"
        raise ConfigError(f"quantization: {name}: no engine reads such a file in the layout format: {format}; {cure}")
    if options.first_layers is not None and name != "wint2":
        raise ConfigError(
            f"quantization_first_layers: {options.first_layers}: of use with quantization: wint2 only, not {name}: "
            "remove it"
        )
    scheme = make(config, options)
    if fits and (reason := unfit(scheme, config)):
        raise ConfigError(reason)
    return scheme


def unfit(scheme: Scheme, config: ModelConfig) -> str:
    """Which matrix of a model has a size that the readers of the scheme do not take, and why; empty if all fit."""
    for matrix in scheme.every_matrix(config):
        if reason := matrix.codec.unfit(matrix.shape):
            return f"quantization: {scheme.name}: {matrix.name} [{matrix.shape[0]}, {matrix.shape[1]}]: {reason}"
    return ""


def _group_of(config: ModelConfig, options: Options, name: str, experts_only: bool = False) -> int:
    """The number of inputs that share a scale. ConfigError where a matrix cannot have such groups."""
    widths: dict[int, str] = {}
    for logical in logical_tensors(config):
        place = place_of(logical)
        if place is not None and (place.role in EXPERTS or not experts_only):
            widths.setdefault(logical.shape[0], logical.pt[0].name)
    tried = GROUPS if options.group is None else (options.group,)
    for group in tried:
        if all(width % group == 0 for width in widths):
            return group
    width, tensor = next((width, tensor) for width, tensor in widths.items() if width % tried[-1])
    shown = " or ".join(str(group) for group in tried)
    raise ConfigError(
        f"quantization: {name}: {tensor} has {width} inputs, which do not divide into groups of {shown}: set "
        f"quantization_group_size to a divisor of all of {', '.join(str(width) for width in sorted(widths))}, or "
        "quantization: wint8, which has no groups"
    )


def _readers(config: ModelConfig, group: int | None = None) -> str:
    """Who loads -PT files, with codes of 4 bits in groups of `group` inputs. transformers stacks experts, and cannot do
    so with those of two widths; it has no class for a reward model.
    """
    vllm = _VLLM
    if group is not None and group not in GROUPS:
        vllm = f"vLLM (not run here; its Marlin kernels have groups of {', '.join(map(str, GROUPS))} only)"
    return vllm if config.vision is not None or config.has_score_head else f"transformers, {vllm}"


def _require_experts(config: ModelConfig, name: str, instead: str) -> None:
    if not config.moe_num_experts:
        raise ConfigError(
            f"quantization: {name}: its 4- and 2-bit codes are those of experts, which this model does not have: set "
            f"quantization: {instead}"
        )


def _wint4(config: ModelConfig, options: Options) -> Scheme:
    codec = PackQuantized(full_range(4, _group_of(config, options, "wint4")))
    said = settings.compressed(config, [settings.group(codec.spec, ["Linear"], "pack-quantized")], "pack-quantized")
    method = f"4-bit codes, a bf16 scale for {codec.spec.group} inputs"
    return Scheme("wint4", "pt", lambda logical, place: codec, said, method, _readers(config, codec.spec.group))


def _wint8(config: ModelConfig, options: Options) -> Scheme:
    codec = PackQuantized(full_range(8))
    said = settings.compressed(config, [settings.group(codec.spec, ["Linear"], "pack-quantized")], "pack-quantized")
    method = "8-bit codes, a bf16 scale for a channel"
    return Scheme("wint8", "pt", lambda logical, place: codec, said, method, _readers(config))


def _wint4_8(config: ModelConfig, options: Options) -> Scheme:
    _require_experts(config, "wint4/8", "wint4 or wint8")
    few = PackQuantized(full_range(4, _group_of(config, options, "wint4/8", experts_only=True)))
    many = PackQuantized(full_range(8))
    groups = [
        settings.group(few.spec, [settings.EXPERT_PROJECTIONS], "pack-quantized"),
        settings.group(many.spec, list(settings.OTHER_PROJECTIONS), "pack-quantized"),
    ]
    method = f"experts 4-bit codes, a bf16 scale for {few.spec.group} inputs; the others 8 bits, a scale for a channel"

    def codec_of(logical: Logical, place: Place) -> Codec:
        return few if place.role in EXPERTS else many

    said = settings.compressed(config, groups, "pack-quantized")
    return Scheme("wint4/8", "pt", codec_of, said, method, _readers(config, few.spec.group))


def _w8a8(config: ModelConfig, options: Options) -> Scheme:
    codec = Unpacked(full_range(8))
    inputs = settings.dynamic_inputs(8)
    groups = [settings.group(codec.spec, ["Linear"], "int-quantized", inputs)]
    said = settings.compressed(config, groups, "int-quantized")
    method = "8-bit codes, a bf16 scale for a channel; the engine quantises activations by token"
    readers = _VLLM if config.moe_num_experts else _readers(config)  # transformers has no fused experts in this form
    return Scheme("w8a8", "pt", lambda logical, place: codec, said, method, readers)


def _fp8(config: ModelConfig, options: Options) -> Scheme:
    codec = Unpacked(FP8_BLOCK, scale_name="weight_scale_inv")
    method = "E4M3 codes, an fp32 scale for 128 x 128; the engine quantises activations by token and 128 inputs"
    readers = f"{_readers(config)}, {_FASTDEPLOY}"
    return Scheme("fp8", "pt", lambda logical, place: codec, settings.block_fp8(config), method, readers)


def _fd_weight_only(name: str) -> Callable[[ModelConfig, Options], Scheme]:
    codec = fastdeploy.WINT8 if name == "wint8" else fastdeploy.WINT4

    def make(config: ModelConfig, options: Options) -> Scheme:
        _refuse_vision(config, name)
        _refuse_group(options, name)
        said = settings.fastdeploy(name)
        method = f"{codec.spec.bits}-bit codes in the order of GPU kernels, a bf16 scale for a channel"
        return Scheme(name, "paddle", lambda logical, place: codec, said, method, _FASTDEPLOY)

    return make


def _fd_wint4_8(config: ModelConfig, options: Options) -> Scheme:
    _refuse_vision(config, "wint4/8")
    _refuse_group(options, "wint4/8")
    _require_experts(config, "wint4/8", "wint4 or wint8")

    def codec_of(logical: Logical, place: Place) -> Codec:
        return fastdeploy.WINT4 if place.role in EXPERTS else fastdeploy.WINT8

    said = settings.fastdeploy("mix_quant", dense_quant_type="wint8", moe_quant_type="wint4")
    method = "experts 4-bit codes, the others 8 bits, in the order of GPU kernels, a bf16 scale for a channel"
    return Scheme("wint4/8", "paddle", codec_of, said, method, _FASTDEPLOY)


def _fd_w4a8(config: ModelConfig, options: Options) -> Scheme:
    _refuse_vision(config, "w4a8")
    _refuse_group(options, "w4a8")
    _require_experts(config, "w4a8", "w8a8 with format: pt")

    def codec_of(logical: Logical, place: Place) -> Codec:
        if place.role not in EXPERTS:
            return fastdeploy.WINT8
        return fastdeploy.W4A8_DOWN if logical.param.endswith("down_proj.weight") else fastdeploy.W4A8_UP_GATE

    said = settings.fastdeploy(
        "mix_quant",
        dense_quant_type="wint8",
        moe_quant_type="w4a8",
        is_permuted=False,
        hadamard_block_size=fastdeploy.W4A8_ROTATION,
    )
    method = "experts 4-bit codes, a scale for a channel, and the range of their inputs; the others 8 bits"
    return Scheme("w4a8", "paddle", codec_of, said, method, _FASTDEPLOY)


def _fd_fp8(config: ModelConfig, options: Options) -> Scheme:
    codec = fastdeploy.TENSOR_WISE_FP8
    method = "E4M3 codes of weights that are rotated by blocks of 32, a scale for a matrix and one for its inputs"
    said = settings.fastdeploy("tensor_wise_fp8")
    return Scheme("fp8", "paddle", lambda logical, place: codec, said, method, _FASTDEPLOY)


def _fd_wint2(config: ModelConfig, options: Options) -> Scheme:
    _refuse_vision(config, "wint2")
    _refuse_group(options, "wint2")
    _require_experts(config, "wint2", "wint4")
    last = _wint2_first_layers(config, options) - 1

    def codec_of(logical: Logical, place: Place) -> Codec:
        if place.role not in EXPERTS:
            return fastdeploy.WINT8
        return fastdeploy.WINT4 if place.layer <= last else wint2_codec.CODEC

    said = settings.wint2(last, config.num_hidden_layers - 1)
    before = ", 4 bits before" if any(config.is_moe_layer(layer) for layer in range(last + 1)) else ""
    method = f"experts 2-bit codes from layer {last + 1} on (counted from 0){before}; the others 8 bits"
    return Scheme("wint2", "paddle", codec_of, said, method, _FASTDEPLOY)


def _wint2_first_layers(config: ModelConfig, options: Options) -> int:
    """The number of layers, counted with dense ones, whose experts have 4 bits."""
    layers = config.num_hidden_layers
    first = round(_WINT2_FIRST_LAYERS * layers) if options.first_layers is None else options.first_layers
    if not any(config.is_moe_layer(layer) for layer in range(first, layers)):
        raise ConfigError(
            f"quantization: wint2: none of the {layers} layers has experts behind the first {first}, so nothing would "
            "have 2 bits: set a smaller quantization_first_layers, or quantization: wint4/8"
        )
    return first


def _refuse_vision(config: ModelConfig, name: str) -> None:
    if config.vision is not None:
        for_vllm = "format: pt" if (name, "pt") in SCHEMES else "quantization: wint4 with format: pt"
        raise ConfigError(
            f"quantization: {name}: FastDeploy has no names for quantised vision-language weights in this form: use "
            f"{for_vllm} for vLLM, or export in 16 bits and let FastDeploy quantise on loading (--quantization)"
        )


def _refuse_group(options: Options, name: str) -> None:
    if options.group is not None:
        raise ConfigError(
            f"quantization_group_size: {options.group}: FastDeploy reads {name} with a scale for a channel: remove it"
        )


SCHEMES: dict[tuple[str, Format], Callable[[ModelConfig, Options], Scheme]] = {
    ("wint4", "pt"): _wint4,
    ("wint8", "pt"): _wint8,
    ("wint4/8", "pt"): _wint4_8,
    ("w8a8", "pt"): _w8a8,
    ("fp8", "pt"): _fp8,
    ("wint8", "paddle"): _fd_weight_only("wint8"),
    ("wint4", "paddle"): _fd_weight_only("wint4"),
    ("wint4/8", "paddle"): _fd_wint4_8,
    ("w4a8", "paddle"): _fd_w4a8,
    ("fp8", "paddle"): _fd_fp8,
    ("wint2", "paddle"): _fd_wint2,
}
