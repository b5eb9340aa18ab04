"""One decoder layer in memory, with its weights from a model directory, in fp32: reads and replaces weights, and runs
calibration tokens through parts of the layer.

Legend: T calibration tokens of all batches, D model, F width of a feed-forward block, K experts a token.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import paddle
from paddle import nn

from erniekit.checkpoint.model_io import WeightSource, fill_weights, named_tensors
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs, token_info
from erniekit.moe.router import route
from erniekit.nn.mlp import swiglu
from erniekit.nn.narrow import add
from erniekit.nn.shard import RankShard
from erniekit.quantize.folds import Block, LayerWeight

# Tokens that pass through a part of a layer at a time.
CHUNK = 4096


class OneLayer:
    """Decoder layer `number` of a model. `source` has the weights of this layer and no others. `prefix` stands before
    the names of its parameters in the model. It implements folds.LayerTensors.
    """

    def __init__(self, config: ModelConfig, number: int, source: WeightSource) -> None:
        self.config, self.prefix = config, f"model.layers.{number}."
        self._number = number
        with paddle.LazyGuard():
            self.model = CausalLM(config, RankShard(layers=(number,), has_embedding=False, has_head=False))
        _allocate(self.model)
        self.model.eval()
        self._layer = self.model.model.layers[number]
        self._tensors = named_tensors(self._layer)
        self.sparse = self._layer.sparse
        for logical in source.logicals:  # experts one by one: a stack is never in memory twice
            self.put(
                LayerWeight(logical.param.removeprefix(self.prefix), logical.index), source.read(logical, as_fp32=True)
            )

    def get(self, place: LayerWeight) -> np.ndarray:
        """See LayerTensors: a copy, fp32."""
        tensor = self._tensors[place.param]
        # A clone: numpy() of an expert's part alone would copy the whole stack.
        return tensor.numpy() if place.index is None else tensor[place.index].clone().numpy()

    def put(self, place: LayerWeight, value: np.ndarray) -> None:
        """See LayerTensors."""
        with paddle.no_grad():
            value = np.ascontiguousarray(value, np.float32)
            tensor = self._tensors[place.param]
            (tensor if place.index is None else tensor[place.index]).set_value(value)  # an expert's part is a view

    @paddle.no_grad()
    def attention_inputs(
        self, batches: Sequence[PackedBatch], hidden_TD: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each batch, what q|k|v multiplies [n, D] and what o multiplies [n, heads * head_dim]."""
        for batch, span in spans(batches):
            normed = self._layer.input_layernorm(paddle.to_tensor(hidden_TD[span]))
            attention = batch_inputs(self.model, batch).attention
            context = self._layer.self_attn.core(self._layer.self_attn.qkv_proj(normed), attention, self._number)
            yield normed.numpy(), context.numpy()

    @paddle.no_grad()
    def run_attention(self, batches: Sequence[PackedBatch], hidden_TD: np.ndarray) -> None:
        """Add attention's result to the hidden states, in place."""
        for batch, span in spans(batches):
            x = paddle.to_tensor(hidden_TD[span])
            inputs = batch_inputs(self.model, batch)
            y = self._layer.self_attn(self._layer.input_layernorm(x), inputs.attention, self._number)
            hidden_TD[span] = add(x, y).numpy()

    @paddle.no_grad()
    def run_feed_forward(self, batches: Sequence[PackedBatch], hidden_TD: np.ndarray) -> None:
        """Add the feed-forward block's result to the hidden states, in place."""
        for batch, span in spans(batches):
            x = paddle.to_tensor(hidden_TD[span])
            normed = self._layer.post_attention_layernorm(x)
            if self.sparse:
                y, _ = self._layer.mlp(normed, token_info(self.config, batch.row_lengths, batch.modality))
            else:
                y = self._layer.mlp(normed)
            hidden_TD[span] = add(x, y).numpy()

    @paddle.no_grad()
    def normed_rows(self, hidden_TD: np.ndarray, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """What the feed-forward block multiplies, of these tokens in order: parts [n, D]."""
        for begin in range(0, len(tokens), CHUNK):
            rows = paddle.to_tensor(hidden_TD[tokens[begin : begin + CHUNK]])
            yield self._layer.post_attention_layernorm(rows).numpy()

    @paddle.no_grad()
    def inner_rows(self, block: Block, normed_ND: np.ndarray) -> np.ndarray:
        """What down multiplies: silu(gate) * up [n, F], from what gate|up multiplies [n, D]."""
        tensor = self._tensors[block.up_gate.param]
        weight = tensor if block.up_gate.index is None else tensor[block.up_gate.index]
        gate_up = paddle.matmul(paddle.to_tensor(normed_ND), weight)
        if block.bias is not None:
            gate_up = gate_up + self._tensors[block.bias.param]
        return swiglu(gate_up).numpy()

    @paddle.no_grad()
    def choices(self, hidden_TD: np.ndarray, tokens: np.ndarray, modality: int) -> np.ndarray:
        """The experts that a modality's router chooses for these tokens [n, K] int64."""
        moe, parts = self._layer.mlp, []
        for normed in self.normed_rows(hidden_TD, tokens):
            logits = moe.gate(paddle.to_tensor(normed), modality)
            parts.append(route(logits, moe.bias_of(modality), moe.options).experts.numpy())
        return np.concatenate(parts) if parts else np.empty((0, moe.options.top_k), np.int64)


def _allocate(model: nn.Layer) -> None:
    """Give every parameter of a model that was made without memory its own, filled with zeros."""
    for layer in model.sublayers(include_self=True):
        for name, parameter in layer.named_parameters(include_sublayers=False):
            zeros = nn.initializer.Constant(0.0)
            new = paddle.create_parameter(parameter.shape, "float32", default_initializer=zeros)
            layer.add_parameter(name, new)


def spans(batches: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, slice]]:
    """Each batch with the numbers of its tokens among those of all batches."""
    begin = 0
    for batch in batches:
        yield batch, slice(begin, begin + batch.num_tokens)
        begin += batch.num_tokens


@paddle.no_grad()
def embedded(config: ModelConfig, source: WeightSource, batches: Sequence[PackedBatch]) -> np.ndarray:
    """What the first layer takes [T, D] fp32: embeddings, with the features of pictures in their places. Only what
    stands in front of the first layer is in memory.
    """
    with paddle.LazyGuard():
        model = CausalLM(config, RankShard(layers=(), has_embedding=True, has_head=False))
    fill_weights(model, source)
    model.eval()
    hidden_TD = np.empty((sum(batch.num_tokens for batch in batches), config.hidden_size), np.float32)
    for batch, span in spans(batches):
        hidden_TD[span] = model.model.embed(batch_inputs(model, batch)).numpy()
    return hidden_TD
