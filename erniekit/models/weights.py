"""Which tensors a checkpoint holds, and how each lies in a "-PT" file, in a "-Paddle" file and in our model.

One table, `logical_tensors(config)`, drives loading, saving, converting and exporting. In memory a projection is
[in, out] and fused (q|k|v, gate|up), and the experts of a layer are stacked. A -PT file (Hugging Face) has each part by
itself as [out, in]; a -Paddle file has the fused [in, out] projection under the prefix `ernie.`, an expert at a time.
docs/weights.md shows the table.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from erniekit.models.config import Format, ModelConfig
from erniekit.models.vision_config import VisionConfig
from erniekit.utils.arrays import copy_transposed
from erniekit.utils.errors import CheckpointError

if TYPE_CHECKING:
    import paddle

Shape = tuple[int, ...]
EXPERTS = ("experts", "vision_experts")  # of a sparse layer, by modality
# The names, in files, of the tensors that decide whether a head is tied.
HEAD = "lm_head.weight"
EMBEDDINGS: dict[Format, str] = {"pt": "model.embed_tokens.weight", "paddle": "ernie.embed_tokens.weight"}


_FREQUENCIES = re.compile(r"(.+\.)?rotary_(pos_)?emb\.inv_freq")
_FUSED_EXPERTS = re.compile(r".+\.experts\.(gate_up_proj|up_gate_proj|down_proj)(\.weight)?")
_PROJECTION = re.compile(r"model\.layers\.\d+\..*\.(qkv|o|up_gate|down)_proj\.weight")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file: which columns of a logical tensor it is, and how they are laid out there."""

    name: str
    shape: Shape  # in the file
    columns: tuple[int, int] | None = None  # of the logical tensor's last axis; None is all of them
    transposed: bool = False  # the file has [out, in]
    heads: int = (
        0  # > 0: the file has q, k, v head by head, [.., H, 3, head_dim]; the logical tensor has [.., 3, H, head_dim]
    )

    def extract(self, logical: np.ndarray) -> np.ndarray:
        """The file's tensor, contiguous, from the logical one; any element type."""
        part = logical if self.columns is None else logical[..., slice(*self.columns)]
        if self.heads:
            grouped = part.reshape(*part.shape[:-1], 3, self.heads, -1)
            return np.ascontiguousarray(grouped.swapaxes(-2, -3)).reshape(part.shape)
        if not self.transposed:
            return np.ascontiguousarray(part)
        out = np.empty(self.shape, part.dtype)
        copy_transposed(part, out)
        return out

    def insert(self, stored: np.ndarray, logical: np.ndarray) -> None:
        """Write the file's tensor into its place in the logical one."""
        part = logical if self.columns is None else logical[..., slice(*self.columns)]
        if self.heads:
            grouped = stored.reshape(*stored.shape[:-1], self.heads, 3, -1)
            part[...] = grouped.swapaxes(-2, -3).reshape(part.shape)
        elif self.transposed:
            copy_transposed(stored, part)
        else:
            part[...] = stored


@dataclass(frozen=True)
class Logical:
    """The smallest unit that maps both ways: a whole parameter, or one expert of a stacked parameter."""

    param: str  # our parameter's (or buffer's) name
    shape: Shape  # of this unit, in our layout
    pt: tuple[Piece, ...]
    paddle: tuple[Piece, ...]
    index: int | None = None  # which expert, along axis 0 of the parameter
    keep_fp32: bool = False  # router matrix and correction bias are float32 in files of any dtype
    is_state: bool = False  # a correction bias: a buffer of the model, not a parameter
    text_twin: str | None = None  # of vision experts: the parameter of the text experts beside them

    def pieces(self, format: Format) -> tuple[Piece, ...]:
        """The tensors of a file of `format` that make up this unit."""
        return self.pt if format == "pt" else self.paddle

    def to_file(self, array: np.ndarray, format: Format) -> list[np.ndarray]:
        """Our array -> one array for each piece."""
        return [piece.extract(array) for piece in self.pieces(format)]

    def from_file(self, arrays: Iterable[np.ndarray], format: Format) -> np.ndarray:
        """One array for each piece, in order -> our array. `arrays` may be an iterator: one is held at a time."""
        pieces = self.pieces(format)
        out: np.ndarray | None = None
        for piece, stored in zip(pieces, arrays, strict=True):
            assert stored.shape == piece.shape, (piece.name, stored.shape, piece.shape)
            if len(pieces) == 1 and piece.columns is None and not piece.transposed and not piece.heads:
                return stored
            out = np.empty(self.shape, stored.dtype) if out is None else out
            piece.insert(stored, out)
        assert out is not None
        return out


class _Table:
    """Collects the logical tensors of a model in the order in which files list them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.rows: list[Logical] = []

    def plain(self, param: str, shape: Shape, keep_fp32: bool = False, is_state: bool = False) -> None:
        """The same array everywhere."""
        pt, paddle = (Piece(_file_name(param, format), shape) for format in ("pt", "paddle"))
        self.rows.append(Logical(param, shape, (pt,), (paddle,), keep_fp32=keep_fp32, is_state=is_state))

    def matrix(self, param: str, shape: Shape, keep_fp32: bool = False) -> None:
        """A projection of one part: [in, out] here and in -Paddle, [out, in] in -PT."""
        pt = Piece(_file_name(param, "pt"), shape[::-1], transposed=True)
        self.rows.append(
            Logical(param, shape, (pt,), (Piece(_file_name(param, "paddle"), shape),), keep_fp32=keep_fp32)
        )

    def fused(
        self, prefix: str, fused: str, parts: dict[str, int], rows: int, heads: int = 0, bias: bool = False
    ) -> None:
        """A projection of several parts joined on the output axis, weight [rows, sum of widths], and its bias.

        `heads` > 0: the -Paddle file goes head by head.
        """
        total = sum(parts.values())
        for kind, lead in (("weight", (rows,)), ("bias", ())):
            if kind == "weight" or bias:
                param, shape = f"{prefix}.{fused}.{kind}", (*lead, total)
                paddle = Piece(_file_name(param, "paddle"), shape, heads=heads)
                self.rows.append(Logical(param, shape, _split(prefix, parts, kind, lead), (paddle,)))

    def experts(self, prefix: str, width: int, stored: str, first: int, twins: str | None) -> None:
        """Routed experts, stacked on axis 0 here and one by one in files, there called `stored` and numbered from
        `first`; they have no bias (as in transformers). `twins`: see Logical.text_twin.
        """
        up_twin, down_twin = (twins and f"{twins}.{leaf}.weight" for leaf in ("up_gate_proj", "down_proj"))
        size = self.config.hidden_size
        parts = {"gate_proj": width, "up_proj": width}
        for e in range(self.config.moe_num_experts):
            paddle = Piece(_file_name(f"{stored}.{first + e}.up_gate_proj.weight", "paddle"), (size, 2 * width))
            pt = _split(f"{stored}.{first + e}", parts, "weight", (size,))
            param = f"{prefix}.up_gate_proj.weight"
            self.rows.append(Logical(param, paddle.shape, pt, (paddle,), index=e, text_twin=up_twin))
        for e in range(self.config.moe_num_experts):
            names = [_file_name(f"{stored}.{first + e}.down_proj.weight", format) for format in ("pt", "paddle")]
            pt = (Piece(names[0], (size, width), transposed=True),)
            paddle = Piece(names[1], (width, size))
            param = f"{prefix}.down_proj.weight"
            self.rows.append(Logical(param, (width, size), pt, (paddle,), index=e, text_twin=down_twin))

    def routed(self, prefix: str) -> None:
        """Routers, correction bias and routed experts of a sparse layer."""
        config, experts = self.config, self.config.moe_num_experts
        shape = (config.hidden_size, experts)
        if config.vision is None:
            self.matrix(f"{prefix}.gate.weight", shape, keep_fp32=True)
        else:  # the routers of a vision-language model are [in, out] in both layouts
            self.plain(f"{prefix}.gate.weight", shape, keep_fp32=True)
            self.plain(f"{prefix}.gate.weight_1", shape, keep_fp32=True)
        modalities = len(config.expert_sizes)
        bias = f"{prefix}.moe_statics.e_score_correction_bias"
        self.plain(bias, (modalities, experts), keep_fp32=True, is_state=True)
        for modality, (name, width) in enumerate(zip(EXPERTS, config.expert_sizes, strict=False)):
            # Files number the vision experts behind the text experts.
            twins = f"{prefix}.{EXPERTS[0]}" if modality else None
            self.experts(f"{prefix}.{name}", width, f"{prefix}.experts", modality * experts, twins)

    def projection(self, prefix: str, shape: Shape) -> None:
        """A projection of one part with its bias."""
        self.matrix(f"{prefix}.weight", shape)
        self.plain(f"{prefix}.bias", shape[1:])

    def layer_norm(self, prefix: str, size: int) -> None:
        self.plain(f"{prefix}.weight", (size,))
        self.plain(f"{prefix}.bias", (size,))

    def vision_model(self, prefix: str, config: VisionConfig) -> None:
        """The vision transformer; q, k and v are one projection in files, too."""
        size, wide = config.hidden_size, config.intermediate_size
        self.matrix(f"{prefix}.patch_embed.proj.weight", (config.patch_features, size))
        for i in range(config.depth):
            block = f"{prefix}.blocks.{i}"
            self.layer_norm(f"{block}.norm1", size)
            self.layer_norm(f"{block}.norm2", size)
            self.projection(f"{block}.attn.qkv", (size, 3 * size))
            self.projection(f"{block}.attn.proj", (size, size))
            self.projection(f"{block}.mlp.fc1", (size, wide))
            self.projection(f"{block}.mlp.fc2", (wide, size))
        self.layer_norm(f"{prefix}.ln", size)

    def resampler_model(self, prefix: str, config: VisionConfig) -> None:
        wide = config.merged_size
        for name, frames in (("spatial_linear", 1), ("temporal_linear", config.temporal_merge_size)):
            self.projection(f"{prefix}.{name}.0", (wide * frames, wide))
            self.projection(f"{prefix}.{name}.2", (wide, wide))
            self.layer_norm(f"{prefix}.{name}.3", wide)
        self.projection(f"{prefix}.mlp", (wide, self.config.hidden_size))
        self.plain(f"{prefix}.after_norm.weight", (self.config.hidden_size,))

    def attention(self, prefix: str) -> None:
        config = self.config
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        # Paddle's module reads the fused projection head by head exactly when keys have as many heads as queries.
        heads = config.num_attention_heads if config.num_key_value_heads == config.num_attention_heads else 0
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.fused(prefix, "qkv_proj", parts, config.hidden_size, heads=heads, bias=config.use_bias)
        self.matrix(f"{prefix}.o_proj.weight", (queries, config.hidden_size))
        if config.use_bias:
            self.plain(f"{prefix}.o_proj.bias", (config.hidden_size,))

    def mlp(self, prefix: str, width: int) -> None:
        config = self.config
        parts = {"gate_proj": width, "up_proj": width}
        self.fused(prefix, "up_gate_proj", parts, config.hidden_size, bias=config.use_bias)
        self.matrix(f"{prefix}.down_proj.weight", (width, config.hidden_size))
        if config.use_bias:
            self.plain(f"{prefix}.down_proj.bias", (config.hidden_size,))

    def layer(self, prefix: str, sparse: bool) -> None:
        config = self.config
        self.plain(f"{prefix}.input_layernorm.weight", (config.hidden_size,))
        self.attention(f"{prefix}.self_attn")
        self.plain(f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,))
        if not sparse:
            self.mlp(f"{prefix}.mlp", config.intermediate_size)
            return
        self.routed(f"{prefix}.mlp")
        if config.moe_num_shared_experts:
            self.mlp(f"{prefix}.mlp.shared_experts", config.moe_intermediate_size * config.moe_num_shared_experts)


def _file_name(param: str, format: Format) -> str:
    if format == "pt" or not param.startswith("model."):
        return param
    inner = param.removeprefix("model.")
    return inner if inner.startswith("vision_model.") else f"ernie.{inner}"


def _other_names(name: str) -> list[str]:
    """Names under which a file may also have a piece: without the prefix of the decoder, or with it. Published files
    have the vision transformer beside the decoder, transformers writes it inside.
    """
    first, _, rest = name.partition(".")
    if is_mtp(name):
        return [rest]
    if first == "vision_model":
        return [f"ernie.{name}"]
    return [rest] if rest.startswith(("vision_model.", "resampler_model.")) else []


def _split(prefix: str, parts: dict[str, int], kind: str, lead: Shape) -> tuple[Piece, ...]:
    """The -PT pieces of a fused projection whose logical tensor is [*lead, sum of widths]."""
    pieces, start = [], 0
    for part, width in parts.items():
        name = _file_name(f"{prefix}.{part}.{kind}", "pt")
        pieces.append(Piece(name, (width, *lead), (start, start + width), transposed=bool(lead)))
        start += width
    return tuple(pieces)


def logical_tensors(config: ModelConfig) -> list[Logical]:
    """Every tensor of a model of this configuration, experts one by one; all units of a parameter stand together."""
    table = _Table(config)
    size = config.hidden_size
    table.plain("model.embed_tokens.weight", (config.vocab_size, size))
    if config.vision is not None:
        table.vision_model("model.vision_model", config.vision)
        table.resampler_model("model.resampler_model", config.vision)
    for i in range(config.num_hidden_layers):
        table.layer(f"model.layers.{i}", config.is_moe_layer(i))
    table.plain("model.norm.weight", (size,))
    if config.has_score_head:
        table.matrix("score.weight", (size, 1))
    if not config.tie_word_embeddings and not config.has_score_head:
        table.matrix("lm_head.weight", (size, config.vocab_size))
    if config.has_head_bias:  # a tied head still has its own
        table.plain("lm_head.bias", (config.vocab_size,))
    for depth in range(config.num_nextn_predict_layers):
        table.plain(f"model.mtp_emb_norm.{depth}.weight", (size,))
        table.plain(f"model.mtp_hidden_norm.{depth}.weight", (size,))
        table.matrix(f"model.mtp_linear_proj.{depth}.weight", (2 * size, size))
        table.layer(f"model.mtp_block.{depth}", sparse=False)
    return table.rows


def is_output_head(param: str) -> bool:
    """Whether a parameter is of the output head, which a model with a score head does not have."""
    return param.startswith("lm_head.")


def our_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of our parameters and persistent buffers, stacked experts as [E, in, out]."""
    shapes = {}
    for logical in logical_tensors(config):
        stacked = logical.index is not None
        shapes[logical.param] = (config.moe_num_experts, *logical.shape) if stacked else logical.shape
    return shapes


def projection_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shapes, as in `our_shapes`, of the projections of the decoder's layers, without multi-token prediction."""
    return {name: shape for name, shape in our_shapes(config).items() if _PROJECTION.fullmatch(name)}


def layer_matrices(config: ModelConfig) -> dict[str, Shape]:
    """The shapes, as in `our_shapes`, of every parameter with the role PROJECTION (nn/roles.py), also of the vision
    part and of multi-token prediction: all matrices but embedding, head and routers. For what must not import Paddle; a
    test compares both.
    """
    return {
        name: shape
        for name, shape in our_shapes(config).items()
        if len(shape) >= 2
        and name.endswith(".weight")
        and name.split(".")[-2] not in ("embed_tokens", "lm_head", "gate")
    }


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers of the whole model, however it is divided; correction biases are state."""
    return sum(math.prod(logical.shape) for logical in logical_tensors(config) if not logical.is_state)


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to multi-token prediction; transformers ignores these, too."""
    return mtp_depth(name) is not None


def is_frequency(name: str) -> bool:
    """Whether a file's tensor has rotary frequencies, which older tools store and every reader computes."""
    return _FREQUENCIES.fullmatch(name) is not None


def is_correction_bias(name: str) -> bool:
    """Whether a file's tensor has the correction biases of a router."""
    return name.endswith(".e_score_correction_bias")


def is_fused_experts(name: str) -> bool:
    """Whether a file's tensor has all experts of a layer in one, as no published file has them."""
    return _FUSED_EXPERTS.fullmatch(name) is not None


def may_be_turned(param: str) -> bool:
    """Whether a matrix of ours may lie in a file as the transpose of what its layout has: in the published
    ERNIE-4.5-300B-A47B-PT this one does, as in a -Paddle file. It is twice as wide as high, so that its shape tells.
    """
    return param.startswith("model.mtp_linear_proj.")


def mtp_depth(name: str) -> int | None:
    """The depth of multi-token prediction that a file's tensor belongs to, whether or not a table has it; 0 where the
    name has no number that can be a depth, None for any other tensor.
    """
    words = name.split(".")
    if not any(word.startswith("mtp_") for word in words):
        return None
    numbers = [word for word in words if word.isascii() and word.isdigit() and len(word) <= 2]
    return int(numbers[0]) if numbers else 0


def detect_format(names: Iterable[str], source: str) -> Format:
    """The layout of a file from its tensor names; CheckpointError (naming `source`) if it is neither."""
    names = list(names)
    is_paddle = any(name.startswith("ernie.") and ".qkv_proj." in name for name in names)
    is_pt = any(name.startswith("model.") and ".q_proj." in name for name in names)
    if is_paddle != is_pt:
        return "paddle" if is_paddle else "pt"
    shown = ", ".join(names[:3])
    raise CheckpointError(
        f"{source}: names of {'both' if is_pt else 'neither'} the -PT (model.layers.0.self_attn.q_proj.weight) "
        f"{'and' if is_pt else 'nor'} the -Paddle layout (ernie.layers.0.self_attn.qkv_proj.weight); found {shown}, "
        "... Use a published checkpoint of an ERNIE 4.5 model, or one that this toolkit saved."
    )


@dataclass(frozen=True)
class Match:
    """A file's names against the table. `stored`: piece name -> name in the file (MTP names may lack their prefix)."""

    stored: dict[str, str]
    missing: list[str]
    unexpected: list[str]


def match_names(logicals: Sequence[Logical], names: Iterable[str], format: Format) -> Match:
    """Find every piece of the table among a file's tensor names."""
    rest = dict.fromkeys(names)
    stored, missing = {}, []
    for piece in (piece for logical in logicals for piece in logical.pieces(format)):
        candidates = [piece.name, *_other_names(piece.name)]
        found = next((name for name in candidates if name in rest), None)
        if found is None:
            missing.append(piece.name)
        else:
            stored[piece.name] = found
            del rest[found]
    return Match(stored, missing, list(rest))


def export_tensors(
    model: "paddle.nn.Layer", format: Format = "pt", what: Literal["param", "grad"] = "param"
) -> Iterator[tuple[str, np.ndarray]]:
    """(checkpoint name, fp32 array) of each parameter, or of its gradient, in the layout of `format`; one at a time.

    `model` has a `.config` (ModelConfig). A parameter without a gradient gives zeros. Correction biases are state, not
    parameters, and appear only with what="param". A tied head is not repeated.
    """
    assert what in ("param", "grad")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    current, whole = "", np.empty(0, np.float32)
    for logical in logical_tensors(model.config):
        if what == "grad" and logical.param in buffers:
            continue
        if logical.param != current:
            tensor = parameters[logical.param] if logical.param in parameters else buffers[logical.param]
            source = tensor if what == "param" else tensor.grad
            whole = np.zeros(tensor.shape, np.float32) if source is None else to_numpy(source)
            current = logical.param
        ours = whole if logical.index is None else whole[logical.index]
        for piece in logical.pieces(format):
            yield piece.name, piece.extract(ours)


def to_numpy(tensor: "paddle.Tensor") -> np.ndarray:
    """A copy on the host as float32 (Paddle hands bfloat16 out as raw bits)."""
    tensor = tensor.detach()
    return (tensor if str(tensor.dtype) == "paddle.float32" else tensor.astype("float32")).numpy()
