"""From tokens to what a model's first layer takes: embeddings, positions, and who sees whom.

Legend: B batch, S sequence, T tokens, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import paddle
from paddle import nn

from erniekit.data.packed_batch import Modality, PackedBatch, PictureTable
from erniekit.data.vision.positions import num_tokens
from erniekit.models.config import ModelConfig
from erniekit.models.picture_balance import PicturePlan
from erniekit.moe.choices import RecordedChoices, table_dtype
from erniekit.moe.layer import TEXT, VISION, RowShares, TokenInfo
from erniekit.nn import decoding
from erniekit.nn.attention import AttentionContext, HeadLayout, PackedAttention
from erniekit.nn.attention_mask import AttentionPlan, make_plan, next_in_document
from erniekit.nn.dropout import AttentionDropout, DropoutStep, number_documents
from erniekit.nn.kv_cache import KVCache, NoteShape
from erniekit.nn.narrow import add, gather, rounded
from erniekit.nn.neftune import EmbeddingNoise, NoiseStep, make_noise
from erniekit.nn.roles import Role
from erniekit.nn.rotary import Rotary
from erniekit.nn.shard import WHOLE, RankShard, Shardable, ShardSpec
from erniekit.parallel.context import ContextRanks, ContextShard, ring_plan
from erniekit.parallel.ring_attention import RingAttention
from erniekit.parallel.ulysses import UlyssesAttention


class Built(Protocol):
    """A model, or what this process holds of it (models.decoder.CausalLM)."""

    config: ModelConfig
    shard: RankShard
    context: ContextRanks | None

    @property
    def token_multiple(self) -> int:
        """What the number of tokens of a pass must divide by."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The images and videos of one forward pass: `patches` [P, channels * size * size] as uint8 pixels or normalised
    floats, `grid` int [N, 3] the frames, rows and columns of patches of each, `places` int64 [M] the token numbers
    whose embeddings their features replace, in the order of the grid.

    With a `plan` patches and grid are those that this rank encodes, maybe for other data ranks, and `places` are of its
    own tokens, in the order in which the plan returns their features. `divided`: some of the tokens may be on other
    context ranks, and have -1 there.
    """

    patches: paddle.Tensor
    grid: np.ndarray
    places: np.ndarray
    plan: PicturePlan | None = None
    divided: bool = False


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures behind the resampler: `features` [M, D], and the token numbers `places` int64 [M] that they replace."""

    features: paddle.Tensor
    places: np.ndarray
    divided: bool = False


@dataclass(frozen=True)
class SharedBatch:
    """A batch whose tokens are divided over context ranks: how, and `input_ids` and `documents` [T] of all of them."""

    shard: ContextShard
    input_ids: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass's T tokens, as every layer, chunk and prediction depth of it uses them: `input_ids` int64 [T] on
    the device, `attention` (who sees whom, and the rotation of positions), `tokens` (what sparse layers count over).
    `noise`: what NEFTune adds to the embeddings, None without it. `pictures`: the images and videos among the tokens,
    None without any. `shared`: the batch that the tokens are a context rank's part of.
    """

    input_ids: paddle.Tensor
    attention: AttentionContext
    tokens: TokenInfo
    noise: EmbeddingNoise | None = None
    pictures: Pictures | EncodedPictures | None = None
    shared: SharedBatch | None = None

    def select(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A mask of the ascending token numbers of the batch that are in this pass, and their rows in it."""
        if self.shared is None:
            return np.ones(len(places), bool), places
        return self.shared.shard.select(places)


def head_layout(config: ModelConfig, shard: RankShard = WHOLE) -> HeadLayout:
    """Attention heads of this configuration that `shard` holds."""
    degree = shard.tensor_degree
    return HeadLayout(config.num_attention_heads // degree, config.num_key_value_heads // degree, config.head_dim)


def batch_inputs(
    model: Built,
    batch: PackedBatch,
    *,
    noise: NoiseStep | None = None,
    dropout: DropoutStep | None = None,
    picture_plan: PicturePlan | None = None,
) -> ModelInputs:
    """The inputs of a packed batch: its tokens, and the padding that the device needs. With a `picture_plan` all ranks
    of its group call this together.

    Only here is padding added (see `padded_length`). It is one document behind all others, without a label, that no
    router sees, so that the numbers of tokens and segments in the batch hold for what the model gives, too.
    """
    if model.context is not None:
        return _context_inputs(model, model.context, batch, noise, dropout, picture_plan)
    padding = padded_length(model, batch) - batch.num_tokens

    def padded(values_T: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(values_T, [(0, padding)] + [(0, 0)] * (values_T.ndim - 1), constant_values=fill)

    return packed_inputs(
        model,
        padded(batch.input_ids),
        padded(batch.segment_ids + 1, batch.num_segments + 1),  # the attention plan takes 0 for the padding of a row
        padded(batch.position_ids),
        prefixes=batch.prefixes,
        tokens=_with_record(model.config, token_info(model.config, batch.row_lengths, batch.modality), batch),
        noise=noise,
        dropout=dropout,
        pictures=pictures_of(model, batch, picture_plan),
    )


def padded_length(model: Built, batch: PackedBatch) -> int:
    """How many tokens of a batch this rank has on the device: a multiple of what the model needs, and some also where
    there are none, so that every rank runs the same graph.
    """
    multiple, num_tokens = model.token_multiple, batch.num_tokens
    if model.context is not None:
        num_tokens = len(model.context.shard(batch.row_lengths).tokens)
    return max(-(-num_tokens // multiple), 1) * multiple


def _context_inputs(
    model: Built,
    context: ContextRanks,
    batch: PackedBatch,
    noise: NoiseStep | None,
    dropout: DropoutStep | None,
    picture_plan: PicturePlan | None,
) -> ModelInputs:
    """The inputs of the tokens that this context rank has of a packed batch, and the padding behind them."""
    config, shard = model.config, context.shard(batch.row_lengths)
    own = shard.tokens
    padding = padded_length(model, batch) - len(own)
    plan = make_plan(batch.segment_ids[None] + 1, batch.prefixes)
    heads, rotary = head_layout(config, model.shard), _rotary(config)
    of_all = _noise_of(noise, config, batch.input_ids, plan, batch.prefixes)
    attention: AttentionContext
    if context.exchange == "a2a":
        part = HeadLayout(heads.num_heads // shard.group.size, heads.num_kv_heads // shard.group.size, heads.dim)
        rotation = rotary.at(batch.position_ids, part.num_heads + part.num_kv_heads, part.num_kv_heads)
        first_head = model.shard.tensor_rank * heads.num_heads + shard.group.index * part.num_heads
        masks = _dropout_of(dropout, config, batch.input_ids, plan, batch.prefixes, first_head)
        attention = UlyssesAttention(shard, heads, PackedAttention(plan, rotation, part, masks))
    else:
        assert dropout is None, "config checks refuse attention dropout with a ring"
        positions = batch.position_ids if batch.num_tokens else np.zeros(1, np.int64)  # padding turns by nothing
        numbers = np.pad(own, (0, padding))
        rotation = rotary.at(positions, heads.num_heads + heads.num_kv_heads, heads.num_kv_heads, own=numbers)
        attention = RingAttention(
            ring_plan(shard, plan.document_of_token, batch.prefixes), rotation, heads, shard.group
        )
    return ModelInputs(
        paddle.to_tensor(np.pad(batch.input_ids[own], (0, padding))),
        attention,
        shared_token_info(config, shard, batch.modality),
        None if of_all is None else of_all.part(own, padding),
        pictures_of(model, batch, picture_plan),
        SharedBatch(shard, batch.input_ids, plan.document_of_token),
    )


def _dropout_of(
    dropout: DropoutStep | None,
    config: ModelConfig,
    input_ids: np.ndarray,
    plan: AttentionPlan,
    prefixes: np.ndarray | None,
    first_head: int,
) -> AttentionDropout | None:
    if dropout is None:
        return None
    numbers = number_documents(input_ids.reshape(-1), plan, prefixes)
    return AttentionDropout(dropout, config.num_hidden_layers, numbers, first_head)


def _noise_of(
    noise: NoiseStep | None,
    config: ModelConfig,
    input_ids: np.ndarray,
    plan: AttentionPlan,
    prefixes: np.ndarray | None,
) -> EmbeddingNoise | None:
    return None if noise is None else make_noise(noise, input_ids.reshape(-1), plan, prefixes, config.hidden_size)


def packed_inputs(
    model: Built,
    input_ids: np.ndarray,
    segment_ids: np.ndarray,
    position_ids: np.ndarray | None = None,
    *,
    prefixes: np.ndarray | None = None,
    tokens: TokenInfo | None = None,
    noise: NoiseStep | None = None,
    dropout: DropoutStep | None = None,
    pictures: Pictures | None = None,
) -> ModelInputs:
    """The inputs of packed documents, made once for all layers.

    input_ids, segment_ids: integers, rows [B, S] or one row [T]; segment ids and `prefixes` as in
    nn.attention_mask.make_plan. position_ids: the same shape, or (time, height, width) with one more axis of 3; by
    default each document starts at 0, or where its prefix ends. tokens: what sparse layers count over (default: all
    tokens are one row of text). noise, dropout: the noise on the embeddings, and the attention dropout, of a training
    step. pictures: the images and videos, whose places count the tokens of all rows; they need
    position_ids.
    """
    assert pictures is None or position_ids is not None, (
        "positions of pictures follow from their sizes, see data/vision"
    )
    plan = make_plan(np.atleast_2d(segment_ids), prefixes)
    positions = plan.position_in_document
    if position_ids is not None:
        positions = position_ids.reshape(plan.num_tokens, *position_ids.shape[segment_ids.ndim :])
    heads = head_layout(model.config, model.shard)
    rotation = _rotary(model.config).at(positions, heads.num_heads + heads.num_kv_heads, heads.num_kv_heads)
    first_head = model.shard.tensor_rank * heads.num_heads
    return ModelInputs(
        paddle.to_tensor(input_ids.reshape(-1).astype(np.int64)),
        PackedAttention(
            plan, rotation, heads, _dropout_of(dropout, model.config, input_ids, plan, prefixes, first_head)
        ),
        token_info(model.config, [plan.num_tokens]) if tokens is None else tokens,
        _noise_of(noise, model.config, input_ids, plan, prefixes),
        pictures,
    )


def token_info(config: ModelConfig, row_lengths: list[int], modality: np.ndarray | None = None) -> TokenInfo:
    """What sparse layers count over. In a vision-language model every token has a modality, also where all are text:
    the vision experts of a rank without pictures may be needed by another.
    """
    if config.vision is None:
        assert modality is None or not modality.any(), "a model of text alone has no experts for pictures"
        return TokenInfo(row_lengths)
    count = sum(row_lengths)
    is_vision = np.zeros(count, bool) if modality is None else modality.reshape(-1) != Modality.TEXT
    return TokenInfo(row_lengths, np.where(is_vision, VISION, TEXT))


def _with_record(config: ModelConfig, tokens: TokenInfo, batch: PackedBatch) -> TokenInfo:
    """`tokens` with the experts that they were sent to during generation, where these were recorded."""
    table = batch.completions
    if table.experts is None:
        return tokens
    return replace(tokens, recorded=RecordedChoices(table.experts, config.sparse_layers, table.replays_experts))


def shared_token_info(config: ModelConfig, shard: ContextShard, modality: np.ndarray) -> TokenInfo:
    """The TokenInfo of a context rank's part of a batch; `modality` [T] is that of the whole batch."""
    whole = token_info(config, shard.row_lengths, modality)
    own = None if whole.modality is None else whole.modality[shard.tokens]
    return TokenInfo(shard.own_row_lengths, own, RowShares(shard.group, whole))


def pictures_of(model: Built, batch: PackedBatch, plan: PicturePlan | None = None) -> Pictures | None:
    """The images and videos of a packed batch; None where it has none, and on pipeline stages without the embedding.
    With a `plan` their patches are sent to the ranks that encode them.

    Raises ValueError where the sizes of the pictures and their placeholders do not belong together.
    """
    table, vision = batch.pictures, model.config.vision
    if not model.shard.has_embedding or (not len(table) and plan is None):
        return None
    assert vision is not None, "a model of text alone has no use for pictures"
    places = _places_of(table, vision.spatial_merge_size)
    placeholders = np.isin(batch.input_ids, vision.placeholders) & (batch.modality != Modality.TEXT)
    if not np.array_equal(places, np.flatnonzero(placeholders)):
        raise ValueError(
            f"{placeholders.sum()} placeholders for {len(table)} images and videos of {len(places)} tokens, or not in "
            "their places"
        )
    divided = model.context is not None
    if model.context is not None:
        table = own_pictures(model, batch)
        places = _places_of(table, vision.spatial_merge_size)
        mask, rows = model.context.shard(batch.row_lengths).select(places)
        places = np.full(len(places), -1)
        places[mask] = rows
    if plan is None:
        return Pictures(paddle.to_tensor(table.patches), table.grid, places, None, divided) if len(table) else None
    patches = table.patches.reshape(-1, vision.patch_features)  # without pictures they have no width
    return Pictures(plan.send_patches(patches), plan.encoded_grid, plan.returned(places), plan, divided)


def _places_of(table: PictureTable, merge_size: int) -> np.ndarray:
    """The token numbers of pictures, in their order, int64 [M]."""
    counts = num_tokens(table.grid, merge_size)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(table.first_tokens, counts) + within


def own_pictures(model: Built, batch: PackedBatch) -> PictureTable:
    """The pictures of a batch of which this rank has tokens. Where context ranks share the tokens of one, each of them
    encodes it, and what its own tokens contribute to the gradients adds up.
    """
    table, vision = batch.pictures, model.config.vision
    if model.context is None or vision is None or not len(table):
        return table
    tokens = model.context.shard(batch.row_lengths).tokens
    ends = table.first_tokens + num_tokens(table.grid, vision.spatial_merge_size)
    kept = np.searchsorted(tokens, table.first_tokens) < np.searchsorted(tokens, ends)
    patches = table.patches[np.repeat(kept, table.grid.prod(axis=1))]
    return PictureTable(patches, table.grid[kept], table.first_tokens[kept])


def new_cache(model: Built, batch_size: int, records_experts: bool = False) -> KVCache:
    """An empty cache for `batch_size` conversations: of the heads that this process has, and of the layers that it
    runs, prediction blocks behind them, whose buffers are made when they are first needed. `records_experts`: its notes
    are the experts of each token in the sparse layers of this process (`noted_layers`).
    """
    heads, config = head_layout(model.config, model.shard), model.config
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    notes = None
    if records_experts:
        notes = NoteShape(len(noted_layers(model)), config.moe_k, table_dtype(config.moe_num_experts))
    return KVCache(num_layers, batch_size, heads, _rotary(config), notes=notes)


def noted_layers(model: Built) -> tuple[int, ...]:
    """The numbers of the sparse layers that this process holds."""
    layers = model.shard.layers
    return tuple(number for number in model.config.sparse_layers if layers is None or number in layers)


def cached_inputs(
    model: Built,
    input_ids_BS: np.ndarray,
    cache: KVCache,
    position_ids: np.ndarray | None = None,
    modality: np.ndarray | None = None,
    pictures: EncodedPictures | None = None,
) -> ModelInputs:
    """The inputs of the next S tokens of each of a cache's conversations. The caller ends the step that this begins.

    position_ids: [B, S] or (time, height, width) [B, S, 3]; by default they count on from the cache's next position.
    modality [B, S] and pictures as in packed_inputs. Where tensor ranks share tokens, tokens whose results nobody reads
    are added up to a multiple of these ranks.
    """
    cache.begin_step(input_ids_BS.shape[1], position_ids)
    tokens = token_info(model.config, [input_ids_BS.size], modality)
    if cache.has_notes:
        columns = {number: column for column, number in enumerate(noted_layers(model))}
        tokens = replace(tokens, note=lambda layer, experts, where: cache.note(columns[layer], experts, where))
    ids_T = np.pad(input_ids_BS.reshape(-1), (0, -input_ids_BS.size % model.token_multiple))
    return ModelInputs(paddle.to_tensor(ids_T), cache, tokens, pictures=pictures)


def _rotary(config: ModelConfig) -> Rotary:
    time = config.vision.time_frequencies if config.vision else 0
    return Rotary(config.head_dim, config.rope_theta, time, config.rope_scaling)


class Embedding(Shardable):
    """Token embedding [V, D]; V are the rows that this process holds.

    Where ranks share the vocabulary, `lookup(ids, weight)` and `own_span` are set from outside: the first gives the
    rows of whole ids, the second which of T tokens are on this rank between projections.
    """

    def __init__(self, vocab_size: int, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [vocab_size, hidden_size], default_initializer=nn.initializer.Normal(0.0, init_std)
        )
        self.lookup: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor] = _rows
        self.own_span: Callable[[int], tuple[int, int]] = lambda num_tokens: (0, num_tokens)

    def shard_specs(self) -> dict[str, ShardSpec]:
        """See Shardable."""
        return {"weight": ShardSpec(0)}

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.EMBEDDING}

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """[...] int64 -> [..., D]."""
        return self.lookup(ids, self.weight)


def _rows(ids: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """weight[ids]. Paddle's embedding takes ten times as long as its gather, but only it has every dtype."""
    if decoding.is_running() and weight.dtype == paddle.float32:
        return paddle.gather(weight, ids)
    return nn.functional.embedding(ids, weight)


def embed(embedding: Embedding, inputs: ModelInputs) -> paddle.Tensor:
    """What the first layer takes [T or own range, D]: token embeddings, with NEFTune's noise if asked for."""
    x_TD = embedding(inputs.input_ids)
    if inputs.noise is None:
        return x_TD
    start, stop = embedding.own_span(len(inputs.noise.bounds))
    return add(x_TD, paddle.to_tensor(inputs.noise.rows(start, stop, x_TD.shape[-1])).astype(x_TD.dtype))


def place_features(
    embedding: Embedding, x_TD: paddle.Tensor, pictures: EncodedPictures, num_tokens: int
) -> paddle.Tensor:
    """Embeddings [T or own range, D] of `num_tokens` tokens -> the same with the features of pictures in their
    places.
    """
    start, stop = embedding.own_span(num_tokens)
    features, numbers = pictures.features, pictures.places
    if stop - start < num_tokens or pictures.divided:  # not only where some are outside: all ranks have the same graph
        own = np.flatnonzero((numbers >= start) & (numbers < stop))
        features, numbers = gather(features, paddle.to_tensor(own)), numbers[own] - start
    places = paddle.to_tensor(numbers)
    return rounded(lambda x, rows: paddle.scatter(x, places, rows), x_TD, features.astype(x_TD.dtype))


def embed_ahead(embedding: Embedding, inputs: ModelInputs, step: int) -> paddle.Tensor:
    """For multi-token prediction: the embedding of the token `step` places after each one, without noise [T or own
    range, D]; of some other token where that is in another document.
    """
    if inputs.shared is None:
        assert isinstance(inputs.attention, PackedAttention), "multi-token prediction is for packed documents"
        target, _ = next_in_document(inputs.attention.plan.document_of_token, step)
        return embedding(paddle.gather(inputs.input_ids, paddle.to_tensor(target)))
    # The token ahead may be on another rank, whose number this one knows.
    whole, own = inputs.shared, inputs.shared.shard.tokens
    target, _ = next_in_document(whole.documents, step)
    ids = np.pad(whole.input_ids[target[own]], (0, inputs.input_ids.shape[0] - len(own)))
    return embedding(paddle.to_tensor(ids))
