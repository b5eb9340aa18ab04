"""Moves scales from the inputs of projections into the operation in front of them, which leaves a layer's function as
it was: x / s from the operation, times s W, is x W.

A gain in front of the feed-forward block feeds the routers, too. If their rows were not multiplied, other experts would
be chosen. Every function here takes them with the projections.

Weights are in our layout, [in, out]: inputs are rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from erniekit.models.config import ModelConfig
from erniekit.nn.attention import HeadLayout

INPUT_NORM, FEED_FORWARD_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a layer: its parameter's name inside the layer, and which expert's."""

    param: str
    index: int | None = None


class LayerTensors(Protocol):
    """The weights of one layer, that can be read and replaced."""

    def get(self, place: LayerWeight) -> np.ndarray:
        """A copy of a weight in our layout, floating."""
        ...

    def put(self, place: LayerWeight, value: np.ndarray) -> None:
        """Replace a weight."""
        ...


class Block(NamedTuple):
    """One SwiGLU block: its fused gate|up projection, the bias of that if there is one, and its down projection.
    `modality`: of a routed expert, whose router chooses it; None: all tokens pass through the block.
    """

    up_gate: LayerWeight
    down: LayerWeight
    bias: LayerWeight | None = None
    modality: int | None = None


class LayerMatrices(NamedTuple):
    """The matrices of a decoder layer: `qkv` and `output` of attention, the feed-forward `blocks` (one of a dense
    layer; routed experts, those of images and the shared ones of a sparse layer), and the `routers` by modality.
    """

    qkv: LayerWeight
    qkv_bias: LayerWeight | None
    output: LayerWeight
    blocks: tuple[Block, ...]
    routers: tuple[LayerWeight, ...]

    @property
    def norm_targets(self) -> list[LayerWeight]:
        """What multiplies the output of the norm in front of the feed-forward block."""
        return [*self.routers, *(block.up_gate for block in self.blocks)]


def layer_matrices(config: ModelConfig, sparse: bool) -> LayerMatrices:
    """The matrices of a dense or sparse layer of this configuration."""

    def bias(name: str) -> LayerWeight | None:
        return LayerWeight(name) if config.use_bias else None

    def block(prefix: str) -> Block:
        up_gate = f"{prefix}.up_gate_proj"
        return Block(
            LayerWeight(f"{up_gate}.weight"), LayerWeight(f"{prefix}.down_proj.weight"), bias(f"{up_gate}.bias")
        )

    blocks, routers = [block("mlp")], []
    if sparse:
        blocks = [block("mlp.shared_experts")] if config.moe_num_shared_experts else []
        for modality, _ in enumerate(config.expert_sizes):
            experts = ("mlp.experts", "mlp.vision_experts")[modality]
            routers.append(LayerWeight(("mlp.gate.weight", "mlp.gate.weight_1")[modality]))
            for index in range(config.moe_num_experts):
                up_gate = LayerWeight(f"{experts}.up_gate_proj.weight", index)
                down = LayerWeight(f"{experts}.down_proj.weight", index)
                blocks.append(Block(up_gate, down, modality=modality))
    qkv = "self_attn.qkv_proj"
    return LayerMatrices(
        LayerWeight(f"{qkv}.weight"),
        bias(f"{qkv}.bias"),
        LayerWeight("self_attn.o_proj.weight"),
        tuple(blocks),
        tuple(routers),
    )


# Rounds a gain to what the file will hold.
Rounding = Callable[[np.ndarray], np.ndarray]


def fold_norm(
    tensors: LayerTensors,
    norm: str,
    targets: Sequence[LayerWeight],
    scale: np.ndarray,
    rounding: Rounding | None = None,
) -> np.ndarray:
    """Divide the gain of a norm by `scale` [in] > 0 and multiply the rows of what follows.

    `rounding`: what happens to the gain in a file. The targets are multiplied by the quotient of the old and the
    rounded new gain, so that rounding it changes nothing. Returns that quotient, the scale that was really folded.
    """
    gain = tensors.get(LayerWeight(norm))
    divided = (gain / scale).astype(gain.dtype)
    if rounding is not None:
        divided = rounding(divided)
    used = divided != 0
    folded = np.where(used, gain / np.where(used, divided, 1), 1).astype(gain.dtype)
    tensors.put(LayerWeight(norm), np.where(used, divided, gain))
    for target in targets:
        tensors.put(target, tensors.get(target) * folded[:, None])
    return folded


def fold_up(tensors: LayerTensors, block: Block, scale: np.ndarray) -> None:
    """Divide the up half of gate|up by `scale` [F] and multiply the rows of down: silu(gate) * up is linear in up."""
    size = len(scale)
    up_gate = tensors.get(block.up_gate)
    up_gate[:, size:] /= scale
    tensors.put(block.up_gate, up_gate)
    if block.bias is not None:
        bias = tensors.get(block.bias)
        bias[size:] /= scale
        tensors.put(block.bias, bias)
    tensors.put(block.down, tensors.get(block.down) * scale[:, None].astype(up_gate.dtype))


def fold_values(tensors: LayerTensors, matrices: LayerMatrices, heads: HeadLayout, scale: np.ndarray) -> None:
    """Divide the value columns of q|k|v by `scale` [kv heads * head_dim] and multiply the rows of o: all query heads
    that share a head of values share its scale.
    """
    first = (heads.num_heads + heads.num_kv_heads) * heads.dim
    qkv = tensors.get(matrices.qkv)
    qkv[:, first:] /= scale
    tensors.put(matrices.qkv, qkv)
    if matrices.qkv_bias is not None:
        bias = tensors.get(matrices.qkv_bias)
        bias[first:] /= scale
        tensors.put(matrices.qkv_bias, bias)
    rows = shared_by_queries(scale, heads).astype(qkv.dtype)
    tensors.put(matrices.output, tensors.get(matrices.output) * rows[:, None])


def shared_by_queries(per_kv_head: np.ndarray, heads: HeadLayout) -> np.ndarray:
    """[kv heads * head_dim] -> [heads * head_dim]: the value of each query head's head of values."""
    grouped = per_kv_head.reshape(heads.num_kv_heads, 1, heads.dim)
    return np.repeat(grouped, heads.repeat, axis=1).reshape(-1)


def mean_over_queries(per_head: np.ndarray, heads: HeadLayout) -> np.ndarray:
    """[heads * head_dim] -> [kv heads * head_dim]: the mean over the query heads that share a head of values."""
    return per_head.reshape(heads.num_kv_heads, heads.repeat, heads.dim).mean(axis=1).reshape(-1)
