"""The ERNIE 4.5 decoder, dense and mixture-of-experts, of text alone or with images and videos, written once for one
device.

Tokens flow as one flat sequence [T, D] (T = B * S, row-major): every layer but attention treats tokens alone, and
attention knows documents through its plan. Legend: B batch, S sequence, T tokens, D model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import paddle
from paddle import nn

from erniekit.data.vision.positions import PositionRule
from erniekit.losses.lm import Head
from erniekit.models.config import ModelConfig
from erniekit.models.inputs import (
    Embedding,
    EncodedPictures,
    ModelInputs,
    Pictures,
    cached_inputs,
    embed,
    head_layout,
    new_cache,
    packed_inputs,
    place_features,
    token_info,
)
from erniekit.models.picture_balance import PictureRanks
from erniekit.models.pictures import HostArray, PictureArguments, picture_tables
from erniekit.models.resampler import Resampler
from erniekit.models.score_head import ScoreHead
from erniekit.models.stages import run_stages
from erniekit.models.vision import VisionTransformer
from erniekit.moe.layer import MoELayer, MoESizes, Routed, TokenInfo
from erniekit.moe.router import RouterOptions
from erniekit.nn import decoding
from erniekit.nn.attention import AttentionContext, SelfAttention
from erniekit.nn.kv_cache import KVCache
from erniekit.nn.linear import Linear
from erniekit.nn.mlp import SwiGLU
from erniekit.nn.narrow import add
from erniekit.nn.norm import RMSNorm
from erniekit.nn.roles import Role
from erniekit.nn.shard import WHOLE, RankShard, Shardable, ShardSpec
from erniekit.parallel.context import ContextRanks
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.sharded_units import ShardedUnits
from erniekit.parallel.tensor import TensorRanks

# Token ids, positions or segments [B, S] as callers have them.
HostIds: TypeAlias = paddle.Tensor | np.ndarray | Sequence[Sequence[int]]


# What each sparse layer's routers decided, by (layer, modality).
Routings = dict[tuple[int, int], Routed]


@dataclass
class Hidden:
    """Decoder output: `last` [T, D] before the final norm, `normed` [T, D] after it, and the routings of the
    sparse layers.
    """

    last: paddle.Tensor
    normed: paddle.Tensor
    routings: Routings = field(default_factory=dict)


def router_options(config: ModelConfig) -> RouterOptions:
    """How the routers of this configuration decide."""
    return RouterOptions(
        config.moe_k, config.moe_norm_min, config.moe_gate_act, config.moe_group_experts, config.moe_capacity_factor
    )


class DecoderLayer(nn.Layer):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, sparse: bool, shard: RankShard = WHOLE) -> None:
        super().__init__()
        std, degree = config.initializer_range, shard.tensor_degree
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            config.hidden_size, head_layout(config, shard), bias=config.use_bias, init_std=std
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = sparse
        if sparse:
            sizes = MoESizes(
                hidden_size=config.hidden_size,
                intermediate_sizes=config.expert_sizes,
                num_experts=config.moe_num_experts,
                num_shared=config.moe_num_shared_experts,
                bias=config.use_bias,
                init_std=std,
                expert_shares=shard.expert_shares,
                tensor_degree=degree,
            )
            self.mlp = MoELayer(sizes, router_options(config))
        else:
            width = config.intermediate_size // degree
            self.mlp = SwiGLU(config.hidden_size, width, bias=config.use_bias, init_std=std)

    def forward(
        self, x_TD: paddle.Tensor, context: AttentionContext, tokens: TokenInfo, layer: int
    ) -> tuple[paddle.Tensor, dict[int, Routed]]:
        """[T, D] -> ([T, D], what the routers decided by modality; empty for a dense layer)."""
        x_TD = add(x_TD, self.self_attn(self.input_layernorm(x_TD), context, layer))
        normed = self.post_attention_layernorm(x_TD)
        if self.sparse:
            y, decisions = self.mlp(normed, tokens, layer)
            return add(x_TD, y), decisions
        return add(x_TD, self.mlp(normed)), {}


class Layers(nn.Layer):
    """The layers of a stack that this process holds, under their numbers in the whole model."""

    def __init__(self, layers: dict[int, DecoderLayer]) -> None:
        super().__init__()
        self.numbers = tuple(layers)
        for number, layer in layers.items():
            self.add_sublayer(str(number), layer)

    def __getitem__(self, number: int) -> DecoderLayer:
        return self._sub_layers[str(number)]

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(self._sub_layers.values())


class Decoder(nn.Layer):
    """Embedding, layers, final norm, and the multi-token-prediction blocks if the configuration has them; or the part
    of them that this process holds.
    """

    def __init__(self, config: ModelConfig, shard: RankShard = WHOLE) -> None:
        super().__init__()
        self.config = config
        size, eps, std = config.hidden_size, config.rms_norm_eps, config.initializer_range
        numbers = range(config.num_hidden_layers) if shard.layers is None else shard.layers
        depths = range(config.num_nextn_predict_layers if shard.has_head else 0)
        # A head that is tied to the embedding, or that looks ahead, needs it on its own process, too.
        self.embed_tokens: Embedding | None = None
        if shard.has_embedding or (shard.has_head and config.tie_word_embeddings) or depths:
            self.embed_tokens = Embedding(config.vocab_size // shard.tensor_degree, size, std)
        self.vision_model: VisionTransformer | None = None
        self.resampler_model: Resampler | None = None
        if config.vision is not None and shard.has_embedding:
            self.vision_model = VisionTransformer(config.vision, std)
            self.resampler_model = Resampler(config.vision, size, eps, std)
        self.layers = Layers({i: DecoderLayer(config, config.is_moe_layer(i), shard) for i in numbers})
        self.norm = RMSNorm(size, eps) if shard.has_head else None
        # Multi-token prediction (models/mtp.py): a dense block a depth, beside the main path, which never reads it.
        self.mtp_emb_norm = nn.LayerList([RMSNorm(size, eps) for _ in depths])
        self.mtp_hidden_norm = nn.LayerList([RMSNorm(size, eps) for _ in depths])
        self.mtp_linear_proj = nn.LayerList([Linear(2 * size, size, init_std=std) for _ in depths])
        self.mtp_block = nn.LayerList([DecoderLayer(config, False, shard) for _ in depths])

    def mtp_layers(self, depth: int) -> list[nn.Layer]:
        """The layers of one depth of multi-token prediction."""
        return [each[depth] for each in (self.mtp_emb_norm, self.mtp_hidden_norm, self.mtp_linear_proj, self.mtp_block)]

    def embed(self, inputs: ModelInputs) -> paddle.Tensor:
        """What the first layer takes [T, D]."""
        assert self.embed_tokens is not None, "this process holds no embedding"
        x_TD = embed(self.embed_tokens, inputs)
        if inputs.pictures is not None:
            x_TD = place_features(self.embed_tokens, x_TD, self.encode(inputs.pictures), inputs.input_ids.shape[0])
        if x_TD.stop_gradient and paddle.is_grad_enabled() and self._trains_vision():
            # A frozen embedding and no picture among this rank's tokens. Another rank's pictures need gradients, so
            # all ranks must have the same graph, or their collectives of the backward pass would not match.
            x_TD = x_TD.detach()
            x_TD.stop_gradient = False
        return x_TD

    def _trains_vision(self) -> bool:
        """Whether anything is trained in front of the first layer but the token embedding."""
        layers = [layer for layer in (self.vision_model, self.resampler_model) if layer is not None]
        return any(not parameter.stop_gradient for layer in layers for parameter in layer.parameters())

    def encode(self, pictures: Pictures | EncodedPictures) -> EncodedPictures:
        """Images and videos through the vision transformer and the resampler, unless they have been already."""
        if isinstance(pictures, EncodedPictures):
            return pictures
        features_MD = self._features(pictures.patches, pictures.grid)
        if pictures.plan is not None:
            features_MD = pictures.plan.return_features(features_MD)
        return EncodedPictures(features_MD, pictures.places, pictures.divided)

    def _features(self, patches: paddle.Tensor, grid_N3: np.ndarray) -> paddle.Tensor:
        assert self.vision_model is not None and self.resampler_model is not None, "a model of text alone"
        if not len(grid_N3):  # other ranks encode all pictures of this one, and their gradients pass through here
            none = paddle.zeros([0, self.config.hidden_size], self.resampler_model.after_norm.weight.dtype)
            none.stop_gradient = not self._trains_vision()
            return none
        frozen = all(parameter.stop_gradient for parameter in self.vision_model.parameters())
        with paddle.no_grad() if frozen else nullcontext():  # a frozen one keeps nothing for the backward pass
            features_PC = self.vision_model(patches, grid_N3)
        return self.resampler_model(features_PC, grid_N3)

    def run(self, x_TD: paddle.Tensor, numbers: Sequence[int], inputs: ModelInputs) -> tuple[paddle.Tensor, Routings]:
        """Layers `numbers` one after another: [T, D] -> ([T, D], the routing of the sparse ones)."""
        routings: Routings = {}
        for number in numbers:
            x_TD, decisions = self.layers[number](x_TD, inputs.attention, inputs.tokens, number)
            routings |= {(number, modality): routed for modality, routed in decisions.items()}
        return x_TD, routings

    def forward(self, inputs: ModelInputs) -> Hidden:
        """T tokens -> Hidden, through a whole model."""
        assert self.norm is not None, "this process holds no final norm"
        x_TD, routings = self.run(self.embed(inputs), self.layers.numbers, inputs)
        return Hidden(x_TD, self.norm(x_TD), routings)


class HeadBias(Shardable):
    """The bias [V] of a head whose matrix is the embedding."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = self.create_parameter([vocab_size], is_bias=True)

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable."""
        return {"bias": ShardSpec(0)}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"bias": Role.BIAS}


class CausalLM(nn.Layer):
    """Decoder with its output head; `model(input_ids)` gives logits, training and generation use the parts.

    With `shard`, only the parameters that one process of several holds, under their names in the whole model; what the
    processes exchange is attached from outside (models/parallelize.py).
    """

    def __init__(self, config: ModelConfig, shard: RankShard = WHOLE) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        self.end_ids, self.fill_id = config.end_ids, config.fill_id  # generation_config.json may say otherwise
        self.directory: Path | None = None  # that it was loaded from
        self.tensor: TensorRanks | None = None  # attached from outside where several processes share projections
        self.model = Decoder(config, shard)
        # The ranks that hold the model together, and the layers of each chunk of this stage (models/stages.py).
        self.mesh = Mesh.single()
        self.context: ContextRanks | None = None  # attached from outside where several processes share a row's tokens
        self.picture_ranks: PictureRanks | None = None
        self.units: ShardedUnits | None = None  # the blocks whose weights are divided over ranks (sharding: stage3)
        self.chunks: tuple[tuple[int, ...], ...] = (self.model.layers.numbers,)
        # Tied, the head is the embedding; transformers still gives a biased MoE head a bias of its own.
        bias = config.has_head_bias
        self.score: ScoreHead | None = None  # of a reward model
        if shard.has_head and config.has_score_head:
            self.score = ScoreHead(config.hidden_size, config.initializer_range)
        self.lm_head: Linear | HeadBias | None = None
        vocab_size = config.vocab_size // shard.tensor_degree
        if shard.has_head and not config.tie_word_embeddings and not config.has_score_head:
            std = config.initializer_range
            self.lm_head = Linear(
                config.hidden_size, vocab_size, bias=bias, split="column", init_std=std, role=Role.HEAD
            )
        elif shard.has_head and bias:
            self.lm_head = HeadBias(vocab_size)

    def parameter_depths(self) -> dict[str, int]:
        """Depth of each parameter in the whole model of n layers: embedding, vision transformer and resampler 0, layer
        i at i + 1, what stands behind the layers (final norm, multi-token prediction) n + 1, the output head n + 2.
        """
        behind = self.config.num_hidden_layers + 1
        places: list[tuple[int, nn.Layer | None]]
        places = [(number + 1, self.model.layers[number]) for number in self.model.layers.numbers]
        places += [(0, self.model.embed_tokens), (0, self.model.vision_model), (0, self.model.resampler_model)]
        places += [(behind + 1, self.lm_head), (behind + 1, self.score)]
        depths = {id(p): depth for depth, layer in places if layer is not None for p in layer.parameters()}
        return {name: depths.get(id(p), behind) for name, p in self.named_parameters()}

    @property
    def residual_dtype(self) -> paddle.dtype:
        """The dtype of what the layers add up."""
        return self.model.layers[self.model.layers.numbers[0]].input_layernorm.weight.dtype

    @property
    def token_multiple(self) -> int:
        """What the number of tokens of a pass must divide by: the ranks that share them."""
        return self.tensor.group.size if self.tensor is not None and self.tensor.sequence else 1

    def output_head(self) -> Head:
        """The head's parameters, as the fused loss takes them. A reward model has none, and no logits."""
        bias = None if self.lm_head is None else self.lm_head.bias
        group = None if self.tensor is None else self.tensor.group
        if self.config.tie_word_embeddings:
            assert self.model.embed_tokens is not None, "this process holds no embedding"
            return Head(self.model.embed_tokens.weight, by_vocab=True, bias=bias, group=group)
        assert isinstance(self.lm_head, Linear), "this process holds no output head"
        return Head(self.lm_head.weight, by_vocab=False, bias=bias, group=group)

    def enter_head(self, normed_TD: paddle.Tensor) -> paddle.Tensor:
        """Normed hidden states, a rank's own -> those of all T tokens, as the fused loss takes them."""
        return normed_TD if self.tensor is None else self.tensor.enter(normed_TD)

    def head(self, hidden_TD: paddle.Tensor) -> paddle.Tensor:
        """Normed hidden states of all tokens [T, D] -> logits [T, V]."""
        return self.output_head().logits(hidden_TD)

    def forward(
        self,
        input_ids: HostIds,
        position_ids: HostIds | None = None,
        segment_ids: HostIds | None = None,
        *,
        attention_mask: HostIds | None = None,
        pixel_values: HostArray | None = None,
        image_grid_thw: HostArray | None = None,
        pixel_values_videos: HostArray | None = None,
        video_grid_thw: HostArray | None = None,
        mm_token_type_ids: HostArray | None = None,
        moe_mm_token_type_ids: HostArray | None = None,
        position_rule: PositionRule = "training",
    ) -> paddle.Tensor:
        """input_ids [B, S] integers -> logits [B, S, V].

        position_ids [B, S]: default, counted from 0 in each document; of a vision-language model also (time, height,
        width) [3, B, S]. segment_ids [B, S]: a token sees the earlier tokens of its own segment; equal ids must stand
        together in a row, 0 marks padding; default, each row is one document. attention_mask [B, S], as
        transformers calls it: the same for rows of one document, 1 for its tokens and 0 for padding. The others are of
        a vision-language model, see PictureArguments. Raises ValueError on wrong shapes, ids outside the vocabulary, or
        pictures that do not fit their placeholders.
        """
        ids = _host_ids(input_ids, "input_ids", None)
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(
                f"input_ids: {ids.min()}..{ids.max()} is outside the vocabulary 0..{self.config.vocab_size - 1}"
            )
        if segment_ids is not None and attention_mask is not None:
            raise ValueError("segment_ids and attention_mask: give one of them, both say which tokens are padding")
        segments = np.ones_like(ids)
        for name, given in (("segment_ids", segment_ids), ("attention_mask", attention_mask)):
            segments = segments if given is None else _host_ids(given, name, ids.shape)
        pictures = PictureArguments(
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            mm_token_type_ids,
            moe_mm_token_type_ids,
            position_rule,
        )
        tables = picture_tables(self.config, ids, segments, pictures)
        positions = None if tables is None else tables.positions
        if position_ids is not None:
            positions = self._positions(position_ids, ids.shape)
        inputs = packed_inputs(
            self,
            ids,
            segments,
            positions,
            tokens=None if tables is None else token_info(self.config, [ids.size], tables.modality),
            pictures=None if tables is None else tables.on_device(),
        )
        return self.head(self.model(inputs).normed).reshape([*ids.shape, self.config.vocab_size])

    def _positions(self, position_ids: HostIds, shape: tuple[int, ...]) -> np.ndarray:
        """position_ids as [B, S], or [B, S, 3] from transformers' [3, B, S]."""
        axes = np.asarray(position_ids.numpy() if isinstance(position_ids, paddle.Tensor) else position_ids)
        if self.config.vision is not None and axes.shape == (3, *shape):
            return np.stack([_host_ids(axis, "position_ids", shape) for axis in axes], axis=-1)
        return _host_ids(axes, "position_ids", shape)

    def new_cache(self, batch_size: int, records_experts: bool = False) -> KVCache:
        """An empty cache for `batch_size` conversations, of the layers and heads that this process holds; see
        models.inputs.new_cache.
        """
        return new_cache(self, batch_size, records_experts)

    @decoding.running()
    def extend(
        self,
        input_ids_BS: np.ndarray,
        num_new_B: np.ndarray,
        cache: KVCache,
        position_ids: np.ndarray | None = None,
        modality: np.ndarray | None = None,
        pictures: EncodedPictures | None = None,
    ) -> paddle.Tensor | None:
        """Feed the next tokens [B, S] (right-padded; row b has num_new_B[b] real ones) -> logits after each row's last
        real token [B, V]. position_ids, modality and pictures as in models.inputs.cached_inputs.

        All ranks of a pipeline and of a tensor group call it with the same tokens. The last stage has the logits, those
        of the whole vocabulary; the other stages get None. Ranks that share experts: see models.stages.run_stages.
        """
        batch, width = input_ids_BS.shape
        inputs = cached_inputs(self, input_ids_BS, cache, position_ids, modality, pictures)
        normed_TD = run_stages(self, inputs)
        cache.end_step(num_new_B)
        if normed_TD is None:
            return None
        last = np.arange(batch) * width + np.asarray(num_new_B) - 1
        return self.head(paddle.gather(normed_TD, paddle.to_tensor(last)))


def _host_ids(values: HostIds, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """A [B, S] integer array on the host, from a tensor, an array or nested lists."""
    array = values.numpy() if isinstance(values, paddle.Tensor) else np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: expected integers of shape [batch, seq], got {array.dtype} of shape {list(array.shape)}"
        )
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: shape {list(array.shape)} differs from input_ids' {list(shape)}")
    return array.astype(np.int64)
