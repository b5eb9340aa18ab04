"""Splits the decoder layers into the model chunks of a pipeline: arithmetic on sizes alone.

A model chunk is a tuple of consecutive layer numbers; the first one also has the embedding, the last one the final
norm, the head and the blocks for multi-token prediction. With p stages, model chunk i is chunk i // p of stage i % p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from erniekit.parallel.model_sizes import ModelSizes, VisionSizes
from erniekit.utils.errors import ConfigError

# The share of the tokens of a vision-language model that is assumed to stand for pictures.
PICTURE_SHARE = 0.5
# ERNIEKit's lists count the embedding (first), the final norm and the head (last) as well as the layers.
ITEMS_BEFORE_LAYERS, ITEMS_BESIDE_LAYERS = 1, 3


@dataclass(frozen=True)
class Costs:
    """Relative costs, in any unit: of each layer, and of what the first and the last chunk have besides layers."""

    layers: tuple[float, ...]
    first: float = 0.0
    last: float = 0.0

    def of(self, chunk: Sequence[int]) -> float:
        """The cost of a model chunk (consecutive layers, at least one)."""
        ends = (self.first if chunk[0] == 0 else 0.0) + (self.last if chunk[-1] == len(self.layers) - 1 else 0.0)
        return ends + sum(self.layers[chunk[0] : chunk[-1] + 1])


def layer_costs(model_config: ModelSizes, mean_context: int) -> Costs:
    """Multiply-adds of the forward pass for one token, from the sizes in a ModelConfig. A token attends to
    `mean_context` tokens: half of a document's length.

    With D = hidden size, H and K = heads times head size of queries and of keys, I = intermediate size:
      attention   2 D (H + K) + 2 H mean_context
      dense       3 D I;    sparse  3 D I_expert (moe_k + shared experts) + D experts
      embedding   D (a row is copied; its gradient is added)
      head        D vocab_size
      vision      PICTURE_SHARE of vision_cost, in the first chunk
      each depth of multi-token prediction: a dense layer, 2 D^2 for its projection, and the head once more.
    The backward pass takes the same multiple of each, and communication is not counted.
    """
    hidden = model_config.hidden_size
    queries = model_config.num_attention_heads * model_config.head_dim
    keys = model_config.num_key_value_heads * model_config.head_dim
    attention = 2 * hidden * (queries + keys) + 2 * queries * mean_context
    dense = attention + 3 * hidden * model_config.intermediate_size
    experts_seen = model_config.moe_k + model_config.moe_num_shared_experts
    router = hidden * model_config.moe_num_experts
    sparse = attention + 3 * hidden * model_config.moe_intermediate_size * experts_seen + router
    head = hidden * model_config.vocab_size
    ahead = model_config.num_nextn_predict_layers * (dense + 2 * hidden**2 + head)
    layers = [sparse if model_config.is_moe_layer(i) else dense for i in range(model_config.num_hidden_layers)]
    vision = 0.0 if model_config.vision is None else PICTURE_SHARE * vision_cost(model_config.vision, hidden)
    return Costs(tuple(float(cost) for cost in layers), hidden + vision, float(head + ahead))


def vision_cost(vision: VisionSizes, hidden: int) -> float:
    """Multiply-adds of vision transformer and resampler for one token of an image; attention within a frame, whose size
    is not known here, is left out.

    With C = features of a patch, I = intermediate size, W = features of the patches that one token joins, and
    merge^2 patches a token:
      block       merge^2 (4 C^2 + 2 C I);    patch embedding  merge^2 C (numbers of a patch)
      resampler   2 W^2 in space, W^2 (frames joined + 1) in time, W hidden to the decoder's width.
    """
    size, wide, patches = vision.hidden_size, vision.merged_size, vision.spatial_merge_size**2
    tower = vision.depth * (4 * size**2 + 2 * size * vision.intermediate_size) + size * vision.patch_features
    return float(patches * tower + wide**2 * (3 + vision.temporal_merge_size) + wide * hidden)


def split_layers(
    num_layers: int, num_chunks: int, method: str | Sequence[int] = "", costs: Costs | None = None
) -> list[tuple[int, ...]]:
    """The layer numbers of each model chunk, in order. `method` is the YAML's pp_seg_method:

    "", "uniform" or "layer:..."  as many layers each; where that does not divide, the first chunks have one more
    "balanced"                    the most expensive chunk is as cheap as possible (needs `costs`)
    (0, 29, 57)                   where each chunk starts, and the end: in layers (the end is num_layers), or as
                                  ERNIEKit counts, with the embedding, the final norm and the head (num_layers + 3)

    Raises ConfigError for fewer layers than chunks, and for a list that does not fit.
    """
    if num_layers < num_chunks:
        raise ConfigError(
            f"{num_layers} layers cannot be split into {num_chunks} chunks (pipeline_parallel_degree x "
            "virtual_pp_degree), each needs at least one. Lower one of the two"
        )
    if not isinstance(method, str):
        return _by_list(num_layers, num_chunks, list(method))
    if method == "balanced":
        assert costs is not None and len(costs.layers) == num_layers
        return list(_balanced(num_chunks, costs))
    assert method in ("", "uniform") or method.startswith("layer:"), method  # config/checks.py refuses others
    sizes = [num_layers // num_chunks + (i < num_layers % num_chunks) for i in range(num_chunks)]
    return _between([0, *accumulate(sizes)])


def _between(bounds: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(range(start, end)) for start, end in pairwise(bounds)]


def _by_list(num_layers: int, num_chunks: int, numbers: list[int]) -> list[tuple[int, ...]]:
    where = f"pp_seg_method: {numbers}"
    if len(numbers) != num_chunks + 1:
        raise ConfigError(
            f"{where} names {len(numbers) - 1} chunks, but pipeline_parallel_degree x virtual_pp_degree is "
            f"{num_chunks}, which needs {num_chunks + 1} numbers"
        )
    if numbers[0] != 0 or numbers[-1] not in (num_layers, num_layers + ITEMS_BESIDE_LAYERS):
        raise ConfigError(
            f"{where} must run from 0 to {num_layers} (the layers), or to {num_layers + ITEMS_BESIDE_LAYERS} "
            f"(embedding, {num_layers} layers, norm and head)"
        )
    if numbers[-1] != num_layers:
        numbers = [min(max(number - ITEMS_BEFORE_LAYERS, 0), num_layers) for number in numbers]
    result = _between(numbers)
    empty = [i for i, chunk in enumerate(result) if not chunk]
    if empty:
        raise ConfigError(f"{where} leaves chunk {empty[0]} without a layer: the numbers must grow from chunk to chunk")
    return result


@lru_cache(maxsize=256)  # a search over layouts splits one model again and again
def _balanced(num_chunks: int, costs: Costs) -> tuple[tuple[int, ...], ...]:
    """Dynamic programming over (chunks used, layers used): the smallest maximum; among equal ones, the smaller sum of
    squares of the chunks so far.
    """
    num_layers = len(costs.layers)
    best: list[tuple[float, float, list[int]] | None] = [(0.0, 0.0, [0])] + [None] * num_layers
    for _ in range(num_chunks):
        following: list[tuple[float, float, list[int]] | None] = [None] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            options = []
            for start, before in enumerate(best[:end]):
                if before is not None:
                    cost = costs.of(range(start, end))
                    options.append((max(before[0], cost), before[1] + cost**2, [*before[2], end]))
            following[end] = min(options, default=None)
        best = following
    solution = best[num_layers]
    assert solution is not None, "as many layers as chunks at least"
    return tuple(_between(solution[2]))
