"""The schemes of quantised files: which weights get which codes, in which files, and what config.json says of them.

One table, `SCHEMES`, has a row for every scheme and layout. Only projections of the decoder's layers are quantised:
never the embeddings, the head, norms, routers, multi-token prediction, the vision transformer and the resampler.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from erniekit.checkpoint.quantised_codecs import Codec, PackQuantized
from erniekit.models.config import Format, ModelConfig
from erniekit.models.weights import Logical, Piece, logical_tensors
from erniekit.precision.codes import CodeSpec, full_range
from erniekit.utils.errors import ConfigError

Role = Literal["attention", "mlp", "shared_experts", "experts", "vision_experts"]

_PROJECTION = re.compile(
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.(?:(shared_experts|experts|vision_experts)\.)?"
    r"(?:qkv_proj|o_proj|up_gate_proj|down_proj)\.weight"
)
# Numbers of inputs that share a scale, the preferred one first: what vLLM's kernels take.
_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Place:
    """Where a weight that can be quantised is: the number of its layer, and its part there."""

    layer: int
    role: Role


def place_of(logical: Logical) -> Place | None:
    """Where a weight is; None for one that no scheme quantises."""
    match = _PROJECTION.fullmatch(logical.param)
    if match is None:
        return None
    if match[2] == "self_attn":
        return Place(int(match[1]), "attention")
    role: Role = match[3] or "mlp"  # type: ignore[assignment]
    return Place(int(match[1]), role)


@dataclass(frozen=True)
class Matrix:
    """A matrix to quantise: the piece of a logical tensor that is `name`.weight in the file. It is [out, in], that is
    the transposed columns `piece.columns` of the logical tensor.
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
        begin, end = self.piece.columns or (0, self.logical.shape[1])
        return end - begin, self.logical.shape[0]


@dataclass(frozen=True)
class Options:
    """`group`: the number of inputs that share a scale; None: chosen by the model's sizes."""

    group: int | None = None


@dataclass(frozen=True)
class Scheme:
    """A scheme for a model: `codec_of` is the codec of the weights at a place, or None where they stay in 16 bits;
    `settings` is what config.json says of it, `method` the words for a log line, and `readers` who loads such a file.
    """

    name: str
    format: Format
    codec_of: Callable[[Place], Codec | None]
    settings: Mapping[str, Any]
    method: str
    readers: str

    def matrices(self, logical: Logical) -> list[Matrix]:
        """The matrices to quantise of a weight, in the order of its pieces; none where it stays in 16 bits."""
        place = place_of(logical)
        codec = None if place is None else self.codec_of(place)
        if place is None or codec is None:
            return []
        return [Matrix(logical, piece, place, codec) for piece in logical.pieces(self.format)]


def _group_of(config: ModelConfig, options: Options, name: str) -> int:
    """The number of inputs that share a scale. ConfigError where a matrix cannot have such groups."""
    widths = {
        logical.shape[0]: logical.pt[0].name for logical in logical_tensors(config) if place_of(logical) is not None
    }
    tried = _GROUPS if options.group is None else (options.group,)
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


def ignored_modules(config: ModelConfig) -> list[str]:
    """The modules of a -PT checkpoint that are not quantised, as compressed-tensors and vLLM name them: a name, or a
    regular expression behind `re:`, which must match from the beginning. Anchored, so that `mlp.gate` is not gate_proj.
    """
    names = ["lm_head"]
    if config.moe_num_experts:
        names.append(r"re:.*mlp\.gate$")
    if config.vision is not None:
        names += [r"re:.*(text|vision)_experts_gate$", r"re:.*vision_(model|tower)\..*", r"re:.*resampler_model\..*"]
    if config.num_nextn_predict_layers:
        names.append(r"re:.*mtp_.*")
    return names


def _compressed_group(spec: CodeSpec, targets: list[str], format: str) -> dict[str, Any]:
    """A config group of compressed-tensors."""
    strategy = "channel" if spec.group is None else "group"
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": spec.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": format,
    }


def _compressed(config: ModelConfig, groups: list[dict[str, Any]], format: str) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ignored_modules(config),
        "kv_cache_scheme": None,
    }


def _wint4(config: ModelConfig, options: Options) -> Scheme:
    spec = full_range(4, _group_of(config, options, "wint4"))
    settings = _compressed(config, [_compressed_group(spec, ["Linear"], "pack-quantized")], "pack-quantized")
    codec = PackQuantized(spec)
    method = f"4-bit codes, a bf16 scale for {spec.group} inputs"
    return Scheme("wint4", "pt", lambda place: codec, settings, method, "vLLM, transformers")


SCHEMES: dict[tuple[str, Format], Callable[[ModelConfig, Options], Scheme]] = {
    ("wint4", "pt"): _wint4,
}


def scheme_for(name: str, format: Format, config: ModelConfig, options: Options) -> Scheme:
    """The scheme `name` in files of `format` for a model. ConfigError: no reader of the scheme knows the format, or the
    model's sizes do not allow it.
    """
    make = SCHEMES.get((name, format))
    if make is None:
        formats = [known for scheme, known in SCHEMES if scheme == name]
        cure = f"; set format: {' or '.join(formats)}" if formats else ""
        raise ConfigError(f"quantization: {name}: no engine reads such a file in the layout format: {format}{cure}")
    return make(config, options)
